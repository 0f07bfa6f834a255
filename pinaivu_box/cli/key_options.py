"""The settings of a key as options of `keys create` and `keys edit`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

import click
import msgspec

from pinaivu_box import policy as policies
from pinaivu_box.config import RoutingPolicy, parse_span
from pinaivu_box.errors import UsageError
from pinaivu_box.policy import LOCAL_ONLY, LONGEST_LIFE, SCOPES, Policy

NONE = "none"  # what puts a setting back to its default
# Setting -> option, where they are not called the same.
_OPTIONS = {"scopes": "scope", "models": "model", "networks": "network", "prices": "price",
            "peers": "peer", "routing": "policy"}  # fmt: skip


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """They arrive as one keyword argument each, under the name of the setting."""
    for option in reversed(
        (
            click.option(
                "--scope",
                "scopes",
                multiple=True,
                type=click.Choice((*SCOPES, LOCAL_ONLY, NONE)),
                help="What it may do; all but admin if not set.  With local-only its requests "
                "never leave this box.  Repeatable.",
            ),
            _repeatable("--model", "models", 'Which models it may use, for example "llama*".'),
            _repeatable("--network", "networks", "From where, for example 10.0.0.0/8.", "CIDR"),
            _repeatable("--peer", "peers", "Which peers may serve it, by name.", "NAME"),
            click.option(
                "--policy",
                "routing",
                type=click.Choice((*get_args(RoutingPolicy), NONE)),
                help="Who serves it, instead of what [peering] says: never is this box alone.",
            ),
            _option("--rpm", "Requests in any minute."),
            _option("--tpm", "Tokens in any minute."),
            _option("--max-parallel", "Requests that run at a time."),
            _option("--max-queue", "Requests that wait beyond these; 0 if not set."),
            _option("--budget", 'What it may spend, for example "10 per 30d", or "10".', "AMOUNT"),
            _option("--weight", "Share of a busy engine beside other keys; 1 if not set."),
            click.option(
                "--lenient/--no-lenient",
                default=None,
                help="Ignore unknown fields of requests, and say so in the answer.",
            ),
            _repeatable(
                "--price",
                "prices",
                "Price of 1,000 tokens by model: GLOB=PRICE or GLOB=PROMPT[/CACHED]/COMPLETION.",
                "GLOB=PRICES",
            ),
        )
    ):
        command = option(command)
    return command


def _option(name: str, text: str, metavar: str = "N") -> Callable[[Any], Any]:
    return click.option(name, metavar=metavar, help=text)


def _repeatable(name: str, field: str, text: str, metavar: str = "GLOB") -> Callable[[Any], Any]:
    return click.option(name, field, multiple=True, metavar=metavar, help=f"{text}  Repeatable.")


def with_options(policy: Policy, given: dict[str, Any]) -> Policy:
    """The policy with what the options say; lists replace what was there.  Raises UsageError."""
    changes = {name: _json(name, v) for name, v in given.items() if v not in (None, ())}
    try:
        made = policies.changed(policy, changes)
        policies.check(made)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        field = path.strip("`").partition("[")[0]
        raise UsageError(f"{option_of(field)}: {message[0].lower()}{message[1:]}.") from error
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    return made


def option_of(field: str) -> str:
    return "--" + _OPTIONS.get(field, field).replace("_", "-")


def expiry(text: str) -> int | None:
    """A duration from now as Unix milliseconds.  Raises UsageError."""
    if text == NONE:
        return None
    try:
        seconds = parse_span(text)
    except ValueError as error:
        raise UsageError(f"--expires: {error}.") from error
    if seconds <= 0:
        raise UsageError("--expires must be longer than nothing.")
    if seconds > LONGEST_LIFE:
        raise UsageError("--expires is at most 36500d, a hundred years.")
    return int((time.time() + seconds) * 1000)


def _json(name: str, value: Any) -> Any:
    """A setting as it is in JSON, null for its default.  Raises UsageError."""
    if value in (NONE, (NONE,)):
        return None
    try:
        if name in ("rpm", "tpm", "max_parallel", "max_queue"):
            return int(value)
        if name == "weight":
            return float(value)
        if name == "budget":
            return msgspec.to_builtins(policies.parse_budget(value))
        if name == "prices":
            return dict(_price(one) for one in value)
    except ValueError as error:
        reason = str(error) if name in ("budget", "prices") else f"'{value}' is no number"
        raise UsageError(f"{option_of(name)}: {reason.removeprefix('budget: ')}.") from error
    return list(value) if isinstance(value, tuple) else value


def _price(text: str) -> tuple[str, Any]:
    glob, separator, prices = text.rpartition("=")
    parts = prices.split("/")
    if not separator or len(parts) > 3:
        raise ValueError(f"'{text}' is not GLOB=PRICE or GLOB=PROMPT[/CACHED]/COMPLETION")
    if len(parts) == 1:
        return glob, prices
    made = {"prompt": parts[0], "completion": parts[-1]}
    return glob, {**made, "cached": parts[1]} if len(parts) == 3 else made
