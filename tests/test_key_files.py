"""Keys for a whole class at once: all of a file, or none of it."""

from __future__ import annotations

import csv
import io
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process_command import run_command, run_command_json

CLASS = """name,account,rpm,budget,model,expires
Ann Lee,ann,60,10 per 30d,llama*; qwen*,90d
"Bob, the second",bob,,,,
Eve,ann,,,,

"""


def create(
    home: Path, text: str | bytes, *options: str, name: str = "students.csv", check: bool = True
) -> Any:
    file = home.parent / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return run_command("keys", "create", "--from", str(file), *options, home=home, check=check)


def counts(home: Path) -> tuple[int, ...]:
    """Keys, accounts and what the audit trail tells."""
    with sqlite3.connect(home / "pinaivu.db") as database:
        return tuple(
            database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("keys", "accounts", "audit")
        )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def with_ann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which nothing changes but by a mistake."""
    made = tmp_path_factory.mktemp("ann") / "home"
    run_command("accounts", "create", "ann", home=made)
    return made


def test_a_key_for_every_line(home: Path) -> None:
    done = create(home, CLASS, "--create-account", "--tpm", "9000")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["name"] for row in rows] == ["Ann Lee", "Bob, the second", "Eve"]
    assert [row["account"] for row in rows] == ["ann", "bob", "ann"]
    assert all(row["key"].startswith("sk-pnv-") for row in rows)
    listed = {key["id"]: key for key in run_command_json("keys", "ls", home=home)}
    first, *others = (listed[row["id"]] for row in rows)
    assert (first["policy"]["rpm"], first["policy"]["tpm"]) == (60, 9000)
    assert first["policy"]["budget"] == {"amount": "10", "period": "30d"}
    assert first["policy"]["models"] == ["llama*", "qwen*"]
    assert rows[0]["expires_at"] == first["expires_at"] and first["expires_at"]
    for other in others:  # what a line leaves out is as the options say
        assert (other["policy"]["rpm"], other["policy"]["tpm"]) == (None, 9000)
        assert other["expires_at"] is None and other["policy"]["models"] == []
    # The secrets are on standard output, once, and nowhere else.
    secrets = [row["key"] for row in rows]
    assert not any(secret in done.stderr for secret in secrets)
    assert not any(secret.encode() in file.read_bytes() for secret in secrets
                   for file in home.glob("pinaivu.db*"))  # fmt: skip
    (again,) = [key for key in listed.values() if rows[1]["key"].startswith(key["prefix"])]
    assert again["name"] == "Bob, the second"
    assert counts(home) == (3, 3, 5)  # with the owner's account


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("name,rpm\na,60\nb,many\n", 3, "rpm"),
        ("name,account\na,\nb,nobody\n", 3, "nobody"),
        ("name,budget\na,10\n\nb,10 per 30\n", 4, "no unit"),
        ("name,expires\na,30\n", 2, "no unit"),
        ("name,expires\na,1d\nb,yesterday\n", 3, "yesterday"),
        ("name,scope\na,inference\nb,root\n", 3, "scope"),
        ("name,scope,account\na,admin,\nb,admin,owner\nc,admin,ann\n", 4, "member"),
        ("name,colour\na,red\n", 1, "colour"),
        ("name,name\na,b\n", 1, "twice"),
        ("account\nann\n", 1, "name"),
        ("", 1, "name"),
        ("name,rpm\na,60,7\n", 2, "3 cells"),
        ("name,limits\na,rpm=5\nb,rpm 5\n", 3, "limits"),
        ("name,limits\na,rpm=5; speed=9\n", 2, "speed"),
        ('name\na\n"b\n', 3, "CSV"),
        ('name\n"a\nb"\n', 3, "name"),  # it ends in the third line
        ("name\n" + "x" * 300 + "\n", 2, "name"),
    ],
)
def test_an_invalid_line_is_named_and_no_key_is_created(
    with_ann: Path, text: str, line: int, why: str
) -> None:
    before = counts(with_ann)
    done = create(with_ann, text, check=False)
    assert done.returncode == 2 and not done.stdout
    (said,) = done.stderr.splitlines()
    assert f"students.csv, line {line}: " in said and why in said and "No key was created." in said
    assert counts(with_ann) == before


def test_a_csv_file_of_a_spreadsheet_is_read(home: Path) -> None:
    text = "\ufeffName;Account;RPM\r\nJürgen;j;7\r\n"
    done = create(home, text.encode(), "--create-account", "--json")
    assert '"name": "Jürgen"' in done.stdout
    (key,) = run_command_json("keys", "ls", home=home)
    assert (key["account"], key["policy"]["rpm"]) == ("j", 7)
    latin = create(home, "name\nJürgen\n".encode("latin-1"), check=False)
    assert latin.returncode == 2 and "UTF-8" in latin.stderr
    formula = create(home, 'name\n"=1+1"\n')
    assert "\n'=1+1," in formula.stdout  # what a spreadsheet would run stays text


def test_limits_may_be_in_one_column_and_a_file_on_standard_input(home: Path) -> None:
    text = "name,limits\na,rpm=60; budget=10 per 30d; model=a:* b:*\nb,\n"
    run_command("keys", "create", "--from", "-", home=home, input=text)
    first, second = run_command_json("keys", "ls", home=home)
    assert first["policy"]["rpm"] == 60 and first["policy"]["models"] == ["a:*", "b:*"]
    assert first["policy"]["budget"]["period"] == "30d" and second["policy"]["rpm"] is None
    # Without accounts each key has one of its own.
    assert first["account"] != second["account"]


def test_accounts_of_keys_without_one_are_told_apart(home: Path) -> None:
    create(home, "name,account\nann,\nann,\n")
    accounts = {key["account"] for key in run_command_json("keys", "ls", home=home)}
    assert len(accounts) == 2 and "ann" in accounts
    taken = create(home, "name,account\nbob,\nbob,bob\n", "--create-account", check=False)
    assert taken.returncode == 2 and "line 3" in taken.stderr


def test_one_key_with_its_account(home: Path) -> None:
    refused = run_command("keys", "create", "--account", "zoe", home=home, check=False)
    assert refused.returncode == 1 and counts(home) == (0, 1, 0)
    made = run_command_json("keys", "create", "--account", "zoe", "--create-account", home=home)
    again = run_command_json("keys", "create", "--account", "zoe", "--create-account", home=home)
    assert made["account"] == again["account"] == "zoe"
    (zoe,) = [one for one in run_command_json("accounts", "ls", home=home) if one["name"] == "zoe"]
    assert (zoe["role"], zoe["keys"]) == ("member", 2)
    for wrong in (
        ("--create-account",), ("--create-account", "--account", "No Name"),
        ("--create-account", "--account", "new", "--admin"), ("--from", "x.csv", "--name", "y"),
    ):  # fmt: skip
        before = counts(home)
        done = run_command("keys", "create", *wrong, home=home, check=False)
        assert done.returncode == 2 and counts(home) == before
