"""Every list fits a terminal of 80 columns: paths and ids go before names do."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import pytest
from rich.cells import cell_len

from pinaivu_box.cli.render import Column, print_table
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, on_terminal

LONG = "the-laptop-of-somebody-with-a-very-long-name-who-is-fond-of-it"  # 62 characters
ACCOUNT = "an-account-that-is-called-something-long-too"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box on which everything has a long name."""
    home = tmp_path_factory.mktemp("a-folder-with-a-long-name-so-that-its-path-is-long") / "home"
    (home / "models").mkdir(parents=True)
    (home / "config.toml").write_text(f'[[model]]\nname = "{LONG}:1"\npath = "fake:0"\n')
    box = Box(home, "--peering")
    box.env = {"PINAIVU_PEERING_PORT": "0"}
    box.start()
    run_command("accounts", "create", ACCOUNT, home=home)
    key = run_command_json(
        *("keys", "create", "--name", LONG, "--account", ACCOUNT, "--expires", "30d"),
        *("--rpm", "60", "--tpm", "20000", "--budget", "10 per 30d"),
        home=home,
    )
    body = {"model": f"{LONG}:1", "messages": [{"role": "user", "content": "hi"}]}
    assert box.http("POST", "/v1/chat/completions", key=key["key"], json=body).status_code == 200
    alarm = ("ab" * 16, "no-statement", f"node_{'0' * 64}", "an origin", 1, "It is so. " * 20)
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db")) as database, database:
        database.execute("INSERT INTO log_alarms VALUES (?, ?, ?, ?, ?, ?, x'', 1)", alarm)
    yield box
    box.end()


# The command, and what must be there whatever the width.
LISTS = {
    "keys": (("keys", "ls"), [LONG, "EXPIRES"]),
    "accounts": (("accounts", "ls"), [ACCOUNT, "ROLE"]),
    "audit": (("audit",), [LONG, ACCOUNT, "key.create"]),
    "models": (("ls",), [f"{LONG}:1", "smollm2:135m", "SIZE"]),
    "engines": (("ps",), [f"{LONG}:1", "idle"]),
    "usage": (("usage", "--by", "key", "--by", "model"), [LONG, "TOKENS", "COST (credits)"]),
    "usage by day and account": (("usage", "--by", "day", "--by", "account"), [ACCOUNT]),
    "ledger": (("ledger",), ["PEER", "BALANCE"]),
    "evidence": (("receipts", "evidence"), ["KIND", "abababababab", "no-statement"]),
    "statements": (("ledger", "statements"), ["PEER", "OWED TO US"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_fits_80_columns_and_keeps_its_names(long: Box, name: str) -> None:
    command, kept = LISTS[name]
    status, shown = on_terminal(*command, home=long.home)
    assert status == 0, shown
    assert max(map(len, shown.splitlines())) <= 80, shown
    assert all(_whole(text, shown) for text in kept), shown
    if name not in ("models", "audit", "evidence"):  # whose paths and details may be cut
        assert "…" not in re.sub(r"sk-pnv-\w+…\w+", "", shown), shown


def _whole(name: str, shown: str) -> bool:
    """Whether its letters are there in their order, though it may be folded."""
    letters = iter("".join(shown.split()))
    return all(letter in letters for letter in name.replace(" ", ""))


@pytest.mark.parametrize("name", LISTS)
def test_with_wide_and_into_a_pipe_everything_is_there(long: Box, name: str) -> None:
    command, kept = LISTS[name]
    status, wide = on_terminal(*command, "--wide", home=long.home)
    piped = run_command(*command, home=long.home).stdout
    assert status == 0
    for text in (wide, piped):
        assert all(one in text for one in kept), text
        assert "with --wide also" not in text
    assert wide.split("\n")[0].split() == piped.split("\n")[0].split()  # all columns


def test_a_path_is_the_first_to_be_shortened(tmp_path: Path) -> None:
    home = tmp_path / ("p" * 60) / "home"
    status, shown = on_terminal("ls", home=home)
    (line,) = [line for line in shown.splitlines() if line.startswith("smollm2:135m")]
    assert status == 0 and line.endswith("smollm2-135m.gguf") and "bundled" in line


def test_a_narrow_terminal_is_told_how_to_see_the_dropped_columns(long: Box) -> None:
    _, shown = on_terminal("keys", "ls", home=long.home)
    left_out = " ".join(shown.partition("with --wide also: ")[2].split()).split(", ")
    assert left_out[:1] == ["ID"]
    _, shown = on_terminal("keys", "ls", home=long.home, columns=300)
    assert all(name in shown.splitlines()[0] for name in left_out)
    assert "--wide" not in shown


def test_lists_show_when_a_key_expires(long: Box) -> None:
    listed = run_command_json("keys", "ls", home=long.home)
    ends = {key["name"]: key["expires_at"] for key in listed}
    _, shown = on_terminal("keys", "ls", home=long.home)
    assert str(ends[LONG])[:16].replace("T", " ") in shown and "never" in shown


def test_any_table_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left out, cut or folded: no line is too long, and no name loses a letter."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for width in (20, 40, 60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        for name in ("a", "名前" * 20, "x" * 150, "many words " * 12, "[bold]:smile:"):
            columns = (
                Column("PATH", itemgetter(0), drop=1, cut="start"),
                Column("NAME", itemgetter(1)),
                Column("SIZE", itemgetter(2), number=True),
                Column("NOTE", itemgetter(3), drop=2),
            )
            print_table([("/" + "d" * 70 + "/file.gguf", name, "12", "n" * 40)], columns)
            shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
            assert all(cell_len(line) <= width for line in shown.splitlines()), shown
            assert _whole(name, shown), shown


def test_two_columns_may_be_called_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column(title, itemgetter(n)) for n, title in enumerate(("", *["http://a"] * 2))]
    print_table([("tokens/s", "1", "2")], columns)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["http://a"] * 2 and row.split() == ["tokens/s", "1", "2"]


def test_json_is_never_shortened(long: Box) -> None:
    _, shown = on_terminal("keys", "ls", "--json", home=long.home)
    assert [key["name"] for key in json.loads(shown)][-1] == LONG
    with sqlite3.connect(long.home / "pinaivu.db") as database:
        (count,) = database.execute("SELECT count(*) FROM keys").fetchone()
    assert len(json.loads(shown)) == count
