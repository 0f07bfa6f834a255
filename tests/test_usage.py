"""Usage and cost: what the API and the command line report is what the answers said."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.box import MODEL, Box, pinaivu, pinaivu_json

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

    def report(self, key: str, **parameters: str) -> Any:
        response = self.box.http("GET", "/v1/usage", key=key, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Used]:
    home = tmp_path_factory.mktemp("usage") / "home"
    home.mkdir()
    (home / "config.toml").write_text(CONFIG)
    box = Box(home, "--model", f"{CHEAP}=fake:0", "--model", f"{DEAR}=fake:0").start()
    alice, bob = (pinaivu_json("keys", "create", home=home)["key"] for _ in range(2))
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
    fresh = pinaivu_json("keys", "create", home=used.box.home)["key"]
    report = used.report(fresh)
    assert (report["total_requests"], report["total_tokens"]) == (0, 0)
    assert report["by_model"] == []
    assert Decimal(report["cost"]) == 0


def test_a_refused_request_costs_nothing(used: Used) -> None:
    before = used.report(used.alice)
    bad = {"model": CHEAP, "messages": [{"role": "user", "content": "x" * 9000}]}
    for body in (bad, {**bad, "temperature": -1}, {**bad, "model": "no:1"}):
        response = used.box.http("POST", "/v1/chat/completions", key=used.alice, json=body)
        assert response.status_code >= 400
    after = used.report(used.alice)
    assert {**after, "request_id": ""} == {**before, "request_id": ""}


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
    listed = pinaivu_json("keys", "ls", home=used.box.home)
    (bob,) = [key for key in listed if used.bob.startswith(key["prefix"])]
    assert bob["requests"] == report["total_requests"]
    assert bob["tokens"] == report["total_tokens"]


# -- the command ---------------------------------------------------------------------------------


def test_the_command_reports_the_whole_box(used: Used) -> None:
    home = used.box.home
    check_report(pinaivu_json("usage", home=home), used.answers)
    check_report(pinaivu_json("usage", "--model", DEAR, home=home), used.of(model=DEAR))
    table = pinaivu("usage", home=home).stdout
    total = f"{sum(a.prompt + a.completion for a in used.answers):,}"
    for text in (MODEL, CHEAP, DEAR, total, "EUR", pinaivu_json("usage", home=home)["cost"]):
        assert text in table


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
        for answer, moment in zip(made, moments, strict=True):
            database.execute(
                "UPDATE requests SET created_at = ? WHERE request_id = ?",
                (moment, answer.request_id),
            )
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
    assert pinaivu_json("usage", *options, home=dated.home)["total_requests"] == expected


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
