"""What a verification consists of: checks, each with a name, a verdict and a sentence."""

from __future__ import annotations

from msgspec import Struct


class VerificationCheck(Struct, frozen=True):
    """One check: its name, whether it holds, and what that means (or what is wrong)."""

    name: str
    ok: bool
    meaning: str


def either(name: str, ok: bool, holds: str, fails: str) -> VerificationCheck:
    return VerificationCheck(name, ok, holds if ok else fails)


def matches(name: str, ok: bool, subject: str) -> VerificationCheck:
    """Whether what the verifier gave is what a commitment of the receipt covers."""
    return VerificationCheck(
        f"{name} commitment", ok, f"{subject} {'' if ok else 'not '}what was committed to"
    )
