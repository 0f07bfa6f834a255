"""A clock that was far ahead, or far behind, and is right again: what was written meanwhile neither
counts nor stands in the way.  Real servers and homes; the clock jumps while they run, and over a
restart.

Each case runs twice: with `tests/clock_seam`, which needs nothing, and with libfaketime (Debian:
`apt-get install faketime`), which also moves the clocks of the C libraries.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.doctor.machine import clock as check_clock
from tests.support.process_box import PINAIVU, Box, wait_until

CONFIG = """
[pricing]
per_1k_tokens = "1000"  # one a token
[retention]
requests = "7d"
receipts = "7d"
responses = "7d"
[[model]]
name = "fast:1"
path = "fake:0"
context = 256
"""
BODY = {
    "model": "fast:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4,
}  # fmt: skip
DAY = 86_400
LIBRARIES = [
    *Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"),
    *Path("/usr/lib*/faketime").glob("libfaketimeMT.so.1"),
]
SEAM = Path(__file__).parent / "clock_seam"


class BoxClock:
    """Of the boxes that get its `env`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._file, self._fake = folder / "clock", kind == "libfaketime"
        self.set(0)
        self.env = {"PYTHONPATH": str(SEAM), "TEST_CLOCK": str(self._file)}
        if self._fake:
            self.env = {
                "LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME_TIMESTAMP_FILE": str(self._file),
                "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip

    def set(self, days: int) -> None:
        """Ahead of the right time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{days:+d}d" if self._fake else str(days * DAY))
        new.replace(self._file)


@pytest.fixture(params=["seam", "libfaketime"])
def clock(request: pytest.FixtureRequest, tmp_path: Path) -> BoxClock:
    if request.param == "libfaketime" and not LIBRARIES:
        pytest.skip("libfaketime is not installed (apt-get install faketime)")
    if request.param == "seam" and "-m" not in PINAIVU:
        pytest.skip("an executable reads no sitecustomize")
    return BoxClock(tmp_path, request.param)


@pytest.fixture
def box(tmp_path: Path, clock: BoxClock) -> Iterator[Box]:
    (tmp_path / "box.toml").write_text(CONFIG)
    made = Box(tmp_path / "home", "--config", str(tmp_path / "box.toml"), env=clock.env)
    yield made
    if hasattr(made, "process"):
        made.end()


def ask(box: Box, key: str) -> httpx.Response:
    return box.http("POST", "/v1/chat/completions", key=key, json=BODY)


def served(box: Box, key: str) -> tuple[int, float]:
    """So often until it is refused for the budget, and until when that says (Unix seconds)."""
    count = 0
    while (answer := ask(box, key)).status_code == 200:
        count += 1
        assert count < 20, "the budget does not hold"
    assert answer.status_code == 402, answer.text
    (text,) = re.findall(r"wait until (\S+Z)", answer.json()["error"]["message"])
    return count, datetime.fromisoformat(text).timestamp()


def make(box: Box, **policy: Any) -> tuple[str, str]:
    """The secret and the id."""
    made = box.http("POST", "/v1/admin/keys", json={"policy": policy}).json()
    return made["key"], made["id"]


def shown(box: Box, key_id: str) -> Any:
    return box.http("GET", f"/v1/admin/keys/{key_id}").json()


def rows(box: Box, sql: str) -> list[Any]:
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        return database.execute(sql).fetchall()


def put_ancient(box: Box, key_id: str) -> str:
    """Retention deletes its row first of all, and its hour last: what this selects."""
    at = int(datetime(2001, 1, 1, 5, tzinfo=UTC).timestamp() * 1000)
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        database.execute(
            "INSERT INTO requests (request_id, key_id, created_at, model, node_id, finish_reason,"
            " prompt_tokens, cached_tokens, completion_tokens, amount, total_ms)"
            f" VALUES ('req_old', '{key_id}', {at}, 'm', 'n', 'stop', 1, 0, 1, 0, 1)"
        )
    return f"SELECT 1 FROM usage WHERE since = {at}"


@pytest.mark.parametrize("days", [400, -20_000], ids=["ahead", "behind"])
def test_when_the_clock_is_right_again_all_goes_on(box: Box, clock: BoxClock, days: int) -> None:
    """Three requests fit into a budget.  One is served by the right clock, three by the wrong one
    (that is another period), and so two more when it is right again.  No receipt goes."""
    box.start()
    cost = ask(box, box.key).json()["usage"]["total_tokens"]
    budget = {"amount": str(3 * cost), "period": "30d"}
    running, ended = make(box, budget=budget), make(box, budget=budget, rpm=5)
    receipts = [ask(box, key).json()["request_id"] for key, _ in (running, ended)]

    clock.set(days)
    now = time.time() + days * DAY
    count, until = served(box, running[0])
    assert count == 3 and now < until <= now + 31 * DAY
    clock.set(0)
    assert shown(box, running[1])["spent"] == str(cost)
    now = time.time()
    count, until = served(box, running[0])  # nothing was forgotten, and nothing is frozen
    assert count == 2 and now < until <= now + 31 * DAY

    wait_until(lambda: rows(box, "SELECT believed FROM clock"), "retention has looked at the clock")
    box.kill()
    old = put_ancient(box, running[1])
    clock.set(days)
    box.start()
    assert served(box, ended[0])[0] == 3
    receipts.append(ask(box, box.key).json()["request_id"])
    if days > 0:  # by this clock all is old; what was old before goes, and nothing else
        wait_until(lambda: not rows(box, old), "its hours have become days, the last of all")
    box.kill()
    clock.set(0)
    box.start()
    # Five a minute: those of the future are not of the last one, nor of the budget's period.
    assert served(box, ended[0])[0] == 2
    assert {shown(box, one)["spent"] for _, one in (running, ended)} == {str(3 * cost)}
    assert ask(box, running[0]).status_code == 402

    last = datetime.fromisoformat(shown(box, ended[1])["last_used_at"])
    assert abs(last.timestamp() - time.time()) < DAY
    for request_id in receipts:
        assert box.http("GET", f"/v1/receipts/{request_id}").status_code == 200
        assert rows(box, f"SELECT 1 FROM requests WHERE request_id = '{request_id}'")
    assert bool(rows(box, "SELECT 1 FROM requests WHERE request_id = 'req_old'")) == (days < 0)
    total = box.http("GET", "/v1/usage").json()["total_requests"]
    yesterday = datetime.fromtimestamp(time.time() - DAY, UTC).date().isoformat()
    lately = box.http("GET", f"/v1/usage?start_date={yesterday}").json()["total_requests"]
    assert (total, lately) == (15, 7)
    found = check_clock(box.home, time.time())
    assert found.state != "failed", found
