"""Usage and cost: what the API and the command line report is what the answers said."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.admin.usage_report import UsageGroup, UsageReport, to_csv
from pinaivu_box.store.usage import UsageFilter, ranked, summed
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import MODEL, Box, on_terminal, wait_until

CHEAP, DEAR = "cheap:1", "dear:1"
PRICES = {MODEL: Decimal("0.0123"), CHEAP: Decimal("0.000001"), DEAR: Decimal("1234.5")}
CONFIG = f"""
[pricing]
currency = "EUR"
per_1k_tokens = "0.0123"
[pricing.models]
"{CHEAP}" = "0.000001"
"{DEAR}" = "1234.5"
"""


@dataclass
class Answer:
    key: str
    model: str
    prompt: int
    completion: int
    request_id: str


@dataclass
class Used:
    """A box on which three keys made requests; `answers` is what they were told."""

    box: Box
    alice: str
    bob: str
    answers: list[Answer]

    def of(self, **wanted: str) -> list[Answer]:
        return [a for a in self.answers if all(getattr(a, k) == v for k, v in wanted.items())]

    def report(self, key: str, /, **parameters: str) -> Any:
        response = self.box.http("GET", "/v1/usage", key=key, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Used]:
    home = tmp_path_factory.mktemp("usage") / "home"
    home.mkdir()
    (home / "config.toml").write_text(CONFIG)
    box = Box(home, "--model", f"{CHEAP}=fake:0", "--model", f"{DEAR}=fake:0").start()
    alice, bob = (run_command_json("keys", "create", home=home)["key"] for _ in range(2))
    answers = []
    for key, model, tokens in [
        (alice, MODEL, 5), (alice, CHEAP, 9), (alice, DEAR, 1), (alice, DEAR, 3),
        (bob, MODEL, 4), (bob, CHEAP, 11), (box.key, DEAR, 6),
    ]:  # fmt: skip
        for stream in (False, True):
            answers.append(ask(box, key, model, tokens, stream))
    yield Used(box, alice, bob, answers)
    box.end()


def ask(box: Box, key: str, model: str, tokens: int, stream: bool) -> Answer:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    answer = box.client_with(key).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello." * tokens}],
        max_tokens=tokens,
        **(options if stream else {}),
    )
    last: Any = list(answer)[-1] if stream else answer
    usage, request_id = last.usage, last.model_extra["request_id"]
    return Answer(key, model, usage.prompt_tokens, usage.completion_tokens, request_id)


def check_report(report: dict[str, Any], answers: list[Answer]) -> None:
    """That the report is the sum of these answers, in all and by model."""
    assert answers
    assert report["total_requests"] == len(answers)
    assert report["prompt_tokens"] == sum(a.prompt for a in answers)
    assert report["completion_tokens"] == sum(a.completion for a in answers)
    assert report["total_tokens"] == report["prompt_tokens"] + report["completion_tokens"]
    by_model = {row["model"]: row for row in report["by_model"]}
    assert set(by_model) == {a.model for a in answers}
    assert len(by_model) == len(report["by_model"])
    for model, row in by_model.items():
        of_model = [a for a in answers if a.model == model]
        assert row["requests"] == len(of_model)
        assert row["prompt_tokens"] == sum(a.prompt for a in of_model)
        assert row["completion_tokens"] == sum(a.completion for a in of_model)
        assert row["tokens"] == row["prompt_tokens"] + row["completion_tokens"]
        assert Decimal(row["cost"]) == PRICES[model] * row["tokens"] / 1000
    assert Decimal(report["cost"]) == sum(Decimal(row["cost"]) for row in report["by_model"])
    assert report["currency"] == "EUR"


# -- sums ----------------------------------------------------------------------------------------


def test_usage_is_the_sum_of_the_answers_usage_of_the_key(used: Used) -> None:
    for key in (used.alice, used.bob):
        check_report(used.report(key), used.of(key=key))


def test_an_admin_key_sees_everybodys_usage(used: Used) -> None:
    check_report(used.report(used.box.key), used.answers)


def test_a_key_that_asked_nothing_has_used_nothing(used: Used) -> None:
    fresh = run_command_json("keys", "create", home=used.box.home)["key"]
    report = used.report(fresh)
    assert (report["total_requests"], report["total_tokens"]) == (0, 0)
    assert report["by_model"] == []
    assert Decimal(report["cost"]) == 0


def without_errors(report: Any) -> Any:
    """A report but for its own id and the errors, which are written a second later."""
    if isinstance(report, list):
        return [without_errors(part) for part in report]
    if isinstance(report, dict):
        names = report.keys() - {"request_id", "errors"}
        return {name: without_errors(report[name]) for name in names}
    return report


def test_a_refused_request_costs_nothing(used: Used) -> None:
    before = used.report(used.alice)
    bad = {"model": CHEAP, "messages": [{"role": "user", "content": "x" * 9000}]}
    for body in (bad, {**bad, "temperature": -1}, {**bad, "model": "no:1"}):
        response = used.box.http("POST", "/v1/chat/completions", key=used.alice, json=body)
        assert response.status_code >= 400
    after = used.report(used.alice)
    assert without_errors(after) == without_errors(before)
    found = wait_until(
        lambda: (told := used.report(used.alice)["errors"]).get("model_not_found") and told,
        "the errors to be counted",
    )
    assert set(found) == {"context_length_exceeded", "invalid_body", "model_not_found"}


def test_the_model_parameter_narrows_it(used: Used) -> None:
    check_report(used.report(used.alice, model=DEAR), used.of(key=used.alice, model=DEAR))
    check_report(used.report(used.box.key, model=CHEAP), used.of(model=CHEAP))
    assert used.report(used.alice, model="no:1")["total_requests"] == 0


# -- cost ----------------------------------------------------------------------------------------


def test_cost_is_the_exact_sum_of_the_receipts(used: Used) -> None:
    paid = []
    for answer in used.of(key=used.alice):
        receipt = used.box.http("GET", f"/v1/receipts/{answer.request_id}", key=used.alice).json()
        tokens = answer.prompt + answer.completion
        assert Decimal(receipt["payment_amount"]) == PRICES[answer.model] * tokens / 1000
        assert "e" not in receipt["payment_amount"].lower()  # plain decimals, never 1E-6
        signed = json.loads(receipt["signed_receipt"])
        assert signed["payment_amount"] == receipt["payment_amount"]
        assert signed["currency"] == "EUR"
        assert signed["usage"]["prompt_tokens"] == answer.prompt
        assert signed["usage"]["completion_tokens"] == answer.completion
        paid.append(Decimal(receipt["payment_amount"]))
    assert sum(paid) > 0
    assert Decimal(used.report(used.alice)["cost"]) == sum(paid)


def test_the_key_counts_what_the_report_says(used: Used) -> None:
    report = used.report(used.bob)
    listed = run_command_json("keys", "ls", home=used.box.home)
    (bob,) = [key for key in listed if used.bob.startswith(key["prefix"])]
    assert bob["requests"] == report["total_requests"]
    assert bob["tokens"] == report["total_tokens"]


# -- groups --------------------------------------------------------------------------------------


def key_of(used: Used, secret: str) -> dict[str, Any]:
    """As it is listed."""
    listed = run_command_json("keys", "ls", home=used.box.home)
    (found,) = [key for key in listed if secret.startswith(key["prefix"])]
    return dict(found)


@pytest.mark.parametrize(
    "by",
    [
        *("day", "hour", "account", "key", "model", "node", "peer"),
        *("key,model", "day,node", "account,key", "account,day", "peer,model", "hour,account"),
    ],
)
def test_groups_add_up_to_the_whole(used: Used, by: str) -> None:
    report = used.report(used.box.key, group_by=by)
    check_report(report, used.answers)
    names = by.split(",")
    labels = [tuple(group[name] for name in names) for group in report["data"]]
    assert labels == sorted(set(labels))
    for field in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        assert sum(group[field] for group in report["data"]) == report[field]
    assert sum(group["requests"] for group in report["data"]) == report["total_requests"]
    assert sum(Decimal(group["cost"]) for group in report["data"]) == Decimal(report["cost"])
    unasked = {"day", "hour", "account", "key", "model", "node", "peer"} - set(names)
    assert not any(unasked & set(group) for group in report["data"])


@pytest.mark.parametrize(
    "by", ["key", "account", "key,model", "account,day", "account,key", "hour,key"]
)
def test_requests_without_a_key_count_for_no_key(used: Used, by: str) -> None:
    """Requests without a key have errors of their own, and no tokens of others."""
    used.box.http("GET", "/v1/usage", key="sk-pnv-nobody")
    wait_until(
        lambda: used.report(used.box.key)["errors"].get("invalid_api_key"), "the 401 to be counted"
    )
    report = used.report(used.box.key, group_by=by)
    check_report(report, used.answers)
    assert sum(group["requests"] for group in report["data"]) == len(used.answers)
    assert sum(group["tokens"] for group in report["data"]) == report["total_tokens"]
    nobody = [group for group in report["data"] if not group[by.split(",")[-1]]]
    for group in nobody if by in ("key", "account") else ():
        assert (group["tokens"], group["cost"], group["total_ms"]) == (0, "0", None)
        assert group["errors"]["invalid_api_key"] >= 1
    printed = run_command(
        "usage", "--csv", *(f"--by={one}" for one in by.split(",")), home=used.box.home
    )
    rows = list(csv.DictReader(io.StringIO(printed.stdout)))
    assert sum(int(row["requests"]) for row in rows) == len(used.answers)


def test_groups_have_names_beside_their_ids(used: Used) -> None:
    home = used.box.home
    made = run_command_json("keys", "create", "--name", "ann's laptop", home=home)
    used.answers.append(ask(used.box, made["key"], CHEAP, 1, False))
    (mine,) = used.report(made["key"], group_by="key,account,node,peer")["data"]
    assert (mine["key"], mine["key_name"]) == (made["id"], "ann's laptop")
    assert mine["account_name"] == made["account"] == "ann-s-laptop"
    assert mine["account"].startswith("acct_")
    assert mine["node"] == mine["peer"] == f"node_{run_command_json('id', home=home)['node_key']}"
    assert mine["node_name"] == mine["peer_name"] == "this box"
    # A key without a name is told by what is shown of its secret.
    alice = key_of(used, used.alice)
    groups = used.report(used.box.key, group_by="key")["data"]
    names = {group["key"]: group["key_name"] for group in groups}
    assert names[alice["id"]] == f"{alice['prefix']}...{alice['last_four']}"
    # Wherever a key or an account is asked for, its name will do.
    for name in ("ann's laptop", made["id"]):
        assert used.report(used.box.key, key=name)["total_requests"] == 1
        assert used.report(made["key"], key=name)["total_requests"] == 1
        assert run_command_json("usage", "--key", name, home=home)["total_requests"] == 1
    for name in ("ann-s-laptop", mine["account"]):
        assert used.report(used.box.key, account=name)["total_requests"] == 1
        assert run_command_json("usage", "--account", name, home=home)["total_requests"] == 1
    assert used.box.http("GET", "/v1/usage", params={"key": "bob's"}).status_code == 404
    # Of another account not even the name is known.
    others = used.box.http("GET", "/v1/usage", key=used.alice, params={"key": "ann's laptop"})
    assert others.status_code == 404
    table = run_command("usage", "--by", "key", "--by", "account", "--by", "peer", home=home).stdout
    (line,) = [line for line in table.splitlines() if "ann's laptop" in line]
    assert "ann-s-laptop" in line and "this box" in line
    assert made["id"] not in table and "acct_" not in table and "node_" not in table
    printed = run_command("usage", "--csv", "--by", "key", home=home).stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert {row["key"]: row["key_name"] for row in rows}[made["id"]] == "ann's laptop"


def test_of_two_keys_with_one_name_the_table_shows_the_ids(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ids = [run_command_json("keys", "create", "--name", "same", home=home)["id"] for _ in range(2)]
    with sqlite3.connect(home / "pinaivu.db") as database:
        for number, key in enumerate(ids):
            database.execute(
                "INSERT INTO requests VALUES"
                " (?, ?, 0, 'fake:1', 'node_1', 'stop', 5, 0, 1, 0, 0, 1, 1)",
                (f"req_{number}", key),
            )
    database.close()
    table = run_command("usage", "--by", "key", home=home).stdout
    assert all(f"same ({key})" in table for key in ids)
    both = run_command("usage", "--key", "same", home=home, check=False)
    assert both.returncode == 1 and all(key in both.stderr for key in ids)
    run_command("keys", "revoke", ids[0], home=home)
    # One that is revoked does not stand in the way of the one that took its name.
    assert run_command_json("usage", "--key", "same", home=home)["total_requests"] == 1


def test_keys_are_told_apart_and_those_of_others_are_not_told(used: Used) -> None:
    groups = used.report(used.box.key, group_by="key")["data"]
    by_key = {group["key"]: group for group in groups if group["requests"]}
    for secret in {answer.key for answer in used.answers}:
        name = key_of(used, secret)["id"]
        assert by_key.pop(name)["requests"] == len(used.of(key=secret))
        check_report(used.report(used.box.key, key=name), used.of(key=secret))
    assert not by_key
    mine = used.report(used.alice, group_by="key")["data"]
    assert {group["key"] for group in mine} == {key_of(used, used.alice)["id"]}
    assert used.report(used.alice, key=key_of(used, used.bob)["id"])["total_requests"] == 0
    refused = used.box.http("GET", "/v1/usage", key=used.alice, params={"account": "owner"})
    assert refused.status_code == 403
    assert used.box.http("GET", "/v1/usage", params={"account": "nobody"}).status_code == 404


def test_an_account_sees_all_of_its_keys(used: Used) -> None:
    home, alice = used.box.home, key_of(used, used.alice)
    second = run_command_json("keys", "create", "--account", alice["account"], home=home)["key"]
    check_report(used.report(second), used.of(key=used.alice))
    check_report(used.report(used.box.key, account=alice["account"]), used.of(key=used.alice))
    table = run_command("usage", "--account", alice["account"], "--by", "key", home=home).stdout
    assert f"{alice['prefix']}...{alice['last_four']}" in table and alice["id"] not in table


def test_waiting_times_are_those_of_the_rows(used: Used) -> None:
    """By nearest rank, to within a tenth."""
    with sqlite3.connect(f"file:{used.box.home / 'pinaivu.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT total_ms, ttft_ms FROM requests").fetchall()
    report = used.report(used.box.key)
    for name, column in (("total_ms", 0), ("ttft_ms", 1)):
        values = sorted(row[column] for row in rows)
        for rank in (50, 90, 99):
            exact = values[-(-rank * len(values) // 100) - 1]
            assert exact <= report[name][f"p{rank}"] <= max(exact + 1, exact * 1.1)


def test_csv_is_what_a_spreadsheet_reads(used: Used) -> None:
    data = used.report(used.box.key, group_by="key,model")["data"]
    response = used.box.http(
        "GET", "/v1/usage", params={"group_by": "key,model"}, headers={"Accept": "text/csv"}
    )
    assert response.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(response.text)))
    # What was refused meanwhile has rows of its own, without a model, and is written once a while.
    assert [(row["key"], row["model"], row["cost"]) for row in rows if row["model"]] == [
        (group["key"], group["model"], group["cost"]) for group in data if group["model"]
    ]
    made = sum(answer.prompt + answer.completion for answer in used.answers)
    assert sum(int(row["tokens"]) for row in rows) == made
    printed = run_command(
        "usage", "--csv", "--by", "key", "--by", "model", home=used.box.home
    ).stdout
    both = [
        [line for line in text.splitlines() if ",," not in line]
        for text in (printed, response.text)
    ]
    assert both[0] == both[1]
    plain = used.box.http("GET", "/v1/usage", headers={"Accept": "text/csv"}).text.splitlines()
    assert len(plain) == 2 and plain[1].startswith(f"{len(used.answers)},")


def test_reports_read_only_what_they_sum(used: Used) -> None:
    """Rows of the time and the keys that were asked for are found by an index."""
    with sqlite3.connect(f"file:{used.box.home / 'pinaivu.db'}?mode=ro", uri=True) as database:
        for wanted in (
            UsageFilter(since=1, until=2),
            UsageFilter(since=1, until=2, key_id="key_1"),
            UsageFilter(since=1, until=2, account_id="acct_owner", model="a"),
        ):
            for by in ((), ("day",), ("model",), ("key", "hour"), ("account", "day"), ("peer",)):
                only = {"key": ["key_1"], "account": ["acct_owner"]}.get(by[0] if by else "")
                statements = [
                    (table, *summed(table, wanted, by, only))
                    for table in ("usage", "latencies", "refusals")
                    if (table, by) != ("refusals", ("peer",))  # which nobody has served
                ]
                rankings = [("usage", *ranked(wanted, who, 5)) for who in ("key", "account")]
                for table, sql, values in [*statements, *rankings]:
                    rows = database.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()
                    plan = " | ".join(row[3] for row in rows)
                    assert f"SEARCH {table} USING" in plan, plan
                    assert "since>? AND since<?)" in plan, plan
                    assert f"SCAN {table}" not in plan and "SCAN refusals" not in plan, plan
                    narrow = wanted != UsageFilter(since=1, until=2) or table != "refusals"
                    assert not narrow or "(key_id=? AND since>? AND since<?)" in plan, plan


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"), ("+1+1", "'+1+1"), ("-1+1", "'-1+1"), ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"), ("\r=1", "'\r=1"), ("\n=1", "'\n=1"), ("  =1+1", "'  =1+1"),
        ("\uff1d1+1", "'\uff1d1+1"), ("\uff0b1+1", "'\uff0b1+1"),
        ("\uff0d1+1", "'\uff0d1+1"), ("\uff20SUM(A1)", "'\uff20SUM(A1)"),
        ("-x:1", "'-x:1"),
        ("-5", "-5"), ("-0.5", "-0.5"), ("+3", "+3"), ("1.5", "1.5"), ("-1e-9", "-1e-9"),
        ("fast:1", "fast:1"), ("a=b", "a=b"), ("EUR", "EUR"), ("", ""),
    ],
)  # fmt: skip
def test_csv_quotes_formulas_and_keeps_numbers(text: str, cell: str) -> None:
    """In every column that is not made of our own numbers."""
    group = UsageGroup(1, 2, 1, 0, 1, text, None, None, {}, model=text)
    made = UsageReport(1, 2, 1, 0, 1, "0", text, None, None, {}, [], [group])
    (row,) = csv.DictReader(io.StringIO(to_csv(made, ("model",)), newline=""))
    assert (row["model"], row["cost"], row["currency"]) == (cell, cell, cell)


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text('[pricing]\ncurrency = "=1+1"\n')
    box = Box(home, "--model", "fake:1=fake:0").start()
    try:
        ask(box, box.key, "fake:1", 1, False)
        assert ",'=1+1," in run_command("usage", "--csv", home=home).stdout
    finally:
        box.end()


def test_of_very_many_keys_those_that_used_most_are_told_apart(tmp_path: Path) -> None:
    home, count = tmp_path / "home", 1001
    run_command("keys", "create", home=home)
    with sqlite3.connect(home / "pinaivu.db") as database:
        numbers = [(f"key_{n:04}", n) for n in range(1, count + 1)]
        database.executemany(
            "INSERT INTO keys (id, account_id, hash, prefix, last_four, name, policy, created_at)"
            " VALUES (?1, 'acct_owner', CAST(?1 AS BLOB), '', '', '', '{}', ?2)",
            numbers,
        )
        database.executemany(
            "INSERT INTO requests VALUES"
            " ('req_' || ?1, ?1, 0, 'fake:1', 'node_1', 'stop', ?2, 0, 1, ?2, 0, ?2, ?2)",
            numbers,
        )
        database.execute("INSERT INTO refusals VALUES ('', 0, '', 'invalid_api_key', 3)")
    database.close()
    for one in ((), ("--account", "owner"), ("--until", "1970-01-01")):
        report = run_command_json("usage", "--by", "key", *one, home=home)
        assert report["more_keys"]
        # Those that used least are not there, and none whose requests had no key.
        assert [group["key"] for group in report["data"]] == [name for name, _ in numbers[1:]]
        assert report["total_requests"] == count
        assert report["prompt_tokens"] == sum(n for _, n in numbers)
    assert "more_keys" not in run_command_json("usage", home=home)
    assert "--account" in run_command("usage", "--by", "key", home=home).stdout.splitlines()[-2]


@pytest.mark.parametrize("by", ["", "week", "day,day", "day,", "key_id"])
def test_a_grouping_that_is_none_is_422(used: Used, by: str) -> None:
    response = used.box.http("GET", "/v1/usage", params={"group_by": by})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["query", "group_by"]


# -- the command ---------------------------------------------------------------------------------


def test_the_command_reports_the_whole_box(used: Used) -> None:
    home = used.box.home
    check_report(run_command_json("usage", home=home), used.answers)
    check_report(run_command_json("usage", "--model", DEAR, home=home), used.of(model=DEAR))
    table = run_command("usage", home=home).stdout
    total = f"{sum(a.prompt + a.completion for a in used.answers):,}"
    for text in (MODEL, CHEAP, DEAR, total, "EUR", run_command_json("usage", home=home)["cost"]):
        assert text in table


@pytest.mark.parametrize("width", [70, 80, 100, 120, 160])
def test_a_terminal_shows_whole_numbers_or_none(tmp_path: Path, width: int) -> None:
    home = tmp_path / "home"
    run_command("keys", "create", home=home)
    with sqlite3.connect(home / "pinaivu.db") as database:
        database.executemany(
            "INSERT INTO requests SELECT ?, id, ?, 'fake:1', 'node_1', 'stop', 8167596803, 0, 1,"
            " 566723721000001, 0, 99999, 1234567 FROM keys",
            [(f"req_{n}", n * 86_400_000) for n in range(3)],
        )
    database.close()
    _, table = on_terminal("usage", "--by", "day", home=home, columns=width)
    told = table.index("with --wide") if "with --wide" in table else len(table)
    table, left_out = table[:told], table[told:]
    assert "…" not in table
    for text in ("1970-01-01", "566723.721000001", "1700171.163000003", "8,167,596,804"):
        assert text in table
    assert ("TOTAL MS" in table) == (width >= 80) != ("TOTAL MS" in left_out)
    assert ("CACHED" in table) == (width >= 160) != ("CACHED" in left_out)


# -- dates ---------------------------------------------------------------------------------------

# Moments (Unix ms) around the month's end in UTC, put into the rows of four finished requests.
JAN_30, JAN_31, FEB_1, FEB_2 = "2026-01-30", "2026-01-31", "2026-02-01", "2026-02-02"
MOMENTS = {
    JAN_30: [1769817599999],  # 2026-01-30T23:59:59.999Z
    JAN_31: [1769817600000, 1769903999999],  # both ends of 2026-01-31
    FEB_1: [1769904000000],  # 2026-02-01T00:00:00.000Z
}


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    home: Path = tmp_path_factory.mktemp("dated") / "home"
    box = Box(home, "--model", f"{CHEAP}=fake:0").start()
    moments = [moment for of_day in MOMENTS.values() for moment in of_day]
    made = [ask(box, box.key, CHEAP, 2, False) for _ in moments]
    assert box.stop() == 0
    with sqlite3.connect(home / "pinaivu.db") as database:
        # Put in again, at the moments of the test: the sums follow the rows that come.
        database.execute("CREATE TABLE old AS SELECT * FROM requests")
        # (Hours that are deleted become days.)
        for table in ("requests", "usage", "usage", "latencies"):
            database.execute(f"DELETE FROM {table}")
        for answer, moment in zip(made, moments, strict=True):
            database.execute(
                "UPDATE old SET created_at = ? WHERE request_id = ?", (moment, answer.request_id)
            )
        database.execute("INSERT INTO requests SELECT * FROM old")
        database.execute("DROP TABLE old")
    database.close()
    yield box.start()
    box.end()


@pytest.mark.parametrize(
    ("start", "end", "days"),
    [
        (None, None, [JAN_30, JAN_31, FEB_1]),
        (JAN_31, None, [JAN_31, FEB_1]),
        (FEB_1, None, [FEB_1]),
        (FEB_2, None, []),
        (None, JAN_31, [JAN_30, JAN_31]),
        (None, JAN_30, [JAN_30]),
        (None, "2026-01-29", []),
        (JAN_31, JAN_31, [JAN_31]),
        (JAN_31, FEB_1, [JAN_31, FEB_1]),
        ("0001-01-01", "9999-12-31", [JAN_30, JAN_31, FEB_1]),
    ],
)
def test_both_dates_are_included(
    dated: Box, start: str | None, end: str | None, days: list[str]
) -> None:
    given = {"start_date": start, "end_date": end}
    parameters = {name: value for name, value in given.items() if value}
    expected = sum(len(MOMENTS[day]) for day in days)
    response = dated.http("GET", "/v1/usage", params=parameters)
    assert response.status_code == 200, response.text
    assert response.json()["total_requests"] == expected
    options = [f"--since={start}"] * bool(start) + [f"--until={end}"] * bool(end)
    assert run_command_json("usage", *options, home=dated.home)["total_requests"] == expected


def test_todays_requests_are_todays(used: Used) -> None:
    """A day of slack on both sides: the test may run around midnight."""
    today = date.today()
    near = {"start_date": str(today - timedelta(1)), "end_date": str(today + timedelta(1))}
    check_report(used.report(used.alice, **near), used.of(key=used.alice))
    assert used.report(used.alice, end_date=str(today - timedelta(2)))["total_requests"] == 0
    assert used.report(used.alice, start_date=str(today + timedelta(2)))["total_requests"] == 0


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"start_date": "yesterday"}, "start_date"),
        ({"end_date": "2026-02-30"}, "end_date"),
        ({"end_date": "2026-01-01T00:00:00Z"}, "end_date"),
        ({"start_date": ""}, "start_date"),
        ({"start_date": "2026-02-02", "end_date": "2026-02-01"}, "end_date"),
        ({"startdate": "2026-02-02"}, "startdate"),
    ],
)
def test_a_parameter_that_is_wrong_is_422_and_named(
    box: Box, parameters: dict[str, str], name: str
) -> None:
    response = box.http("GET", "/v1/usage", params=parameters)
    assert response.status_code == 422
    (detail,) = response.json()["detail"]
    assert detail["loc"] == ["query", name]
    assert response.json()["error"]["param"] == name
