"""Wire types of `/v1/memories`, and of what seals an account's chats and memories.

Times are Unix milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from pinaivu_box.openai.types import Strict

MAX_MEMORY = 500  # characters

MemoryText = Annotated[str, Meta(min_length=1, max_length=MAX_MEMORY)]
# How it came to be: written in the list, said by the user ("remember that ..."), found by the model
# in what the user said, or imported.
Origin = Literal["added", "said", "found", "imported"]
# What wraps the key of an account's chats.  `none`: nothing, it lies beside them.
Sealed = Literal["password", "passphrase", "none"]
Secret = Annotated[str, Meta(min_length=1, max_length=1000)]
NewSecret = Annotated[str, Meta(min_length=8, max_length=1000)]


class Memory(Struct, frozen=True):
    """One sentence about the user."""

    id: str
    text: str
    origin: Origin
    created_at: int
    updated_at: int
    object: str = "memory"


class MemoryList(Struct, frozen=True):
    """All, newest first.  `enabled`: whether conversations use and add them at all.  `search` says
    how they are found: by an embedding model that is loaded, or by their words."""

    data: list[Memory]
    enabled: bool
    search: Literal["embeddings", "words"]
    object: str = "list"


class NewMemory(Strict, frozen=True):
    text: MemoryText


class MemorySettings(Strict, frozen=True):
    enabled: bool


class SealedState(Struct, frozen=True):
    """`sealed` is null before the first use.  `unlocked`: whether this session has the key.
    `lost`: the secret that wrapped it was replaced by somebody who did not know it.
    `offer_recovery_key`: whether there is none, and it was not offered yet."""

    sealed: Sealed | None
    unlocked: bool
    recovery_key: bool
    lost: bool
    offer_recovery_key: bool


class Unlock(Strict, frozen=True):
    """`secret`: the password, the passphrase, or the recovery key."""

    secret: Secret


class Seal(Strict, frozen=True):
    """`passphrase` is needed for `passphrase`, and `password` (the account's own) for `password`.
    `secret`: see `Confirmed`; it is needed unless `password` is, or nothing is sealed yet."""

    sealed: Sealed
    passphrase: Secret | Literal[""] = ""
    password: Secret = ""
    secret: Secret | Literal[""] = ""


class Confirmed(Strict, frozen=True):
    """`secret`: the account's password, its passphrase or its recovery key, unless the login was
    just now."""

    secret: Secret | Literal[""] = ""


class RecoveryKey(Struct, frozen=True):
    """Shown once."""

    recovery_key: str


class StartAnew(Strict, frozen=True):
    """Delete chats and memories that nobody can open any more."""

    delete_everything: Literal[True]


class Erase(Strict, frozen=True):
    """`name`: of the account, so that nobody does it by mistake.  `password`: unless the account
    has none."""

    name: Annotated[str, Meta(max_length=64)]
    password: Annotated[str, Meta(max_length=1000)] = ""


class Erased(Struct, frozen=True):
    account: str
    conversations: int
    memories: int
    responses: int
    transcripts: int = 0
