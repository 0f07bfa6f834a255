"""What the shell suggests for the names of keys, accounts, models and peers (`cli/completion`).

Each is called with the beginning that was typed and returns the names that may be meant.  A shell
waits for it, so nothing is opened that must be migrated, created or started, and whatever fails
suggests nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from pinaivu_box.config import default_home

# A name with other characters would need quotes; its id is suggested in its place.
_PLAIN = re.compile("[A-Za-z0-9._:@/+-]+")
_MOST = 200
_SECONDS = 2.0
_KEYS = (
    "SELECT name, id FROM keys WHERE revoked_at IS NULL AND id NOT IN"
    " (SELECT pages_key FROM accounts WHERE pages_key IS NOT NULL) ORDER BY created_at DESC LIMIT ?"
)
_ACCOUNTS = "SELECT name, id FROM accounts WHERE removed_at IS NULL ORDER BY name LIMIT ?"

Suggest = Callable[[click.Context, click.Parameter, str], list[str]]


def _suggesting(find: Callable[[Path], Iterable[str]]) -> Suggest:
    def suggest(context: click.Context, _parameter: click.Parameter, beginning: str) -> list[str]:
        home = context.params.get("home") or default_home()
        try:
            found = list(dict.fromkeys(find(Path(home))))
        except Exception:  # a shell cannot be told
            return []
        return [name for name in found if name.startswith(beginning) and _PLAIN.fullmatch(name)]

    return suggest


def _rows(home: Path, query: str) -> list[str]:
    """Names, or the ids of those that are empty, not plain, or not the only one."""
    from pinaivu_box.store import integrity

    with integrity.reading(home / "pinaivu.db") as connection:
        connection.execute(f"PRAGMA busy_timeout = {int(_SECONDS * 1000)}")
        found: list[tuple[str, str]] = connection.execute(query, (_MOST,)).fetchall()
    names = [name for name, _ in found]
    single = {name for name in names if names.count(name) == 1 and _PLAIN.fullmatch(name)}
    return [name if name in single else key_id for name, key_id in found]


def _of_server(home: Path, path: str, field: str) -> list[str]:
    """A field of what the running server lists.  Raises CliError."""
    from pinaivu_box.cli.client import request

    return [str(each[field]) for each in request(home, path, seconds=_SECONDS)["data"]]


def _known_models(_home: Path) -> list[str]:
    from pinaivu_box.models.known_models import search

    return [model.name for model in search("")]


keys = _suggesting(lambda home: _rows(home, _KEYS))
accounts = _suggesting(lambda home: _rows(home, _ACCOUNTS))
models = _suggesting(lambda home: _of_server(home, "/v1/models", "id"))
known_models = _suggesting(_known_models)
peers = _suggesting(lambda home: _of_server(home, "/v1/admin/peers", "name"))
