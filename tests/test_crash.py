"""What is killed, cut off or told to stop leaves a true account behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import gguf_files
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import MODEL, UNDRAFTED, Box, alive, wait_until
from tests.support.spending import spent
from tests.support.streamed_chat import URL, StreamedChat, body, http_client
from tests.support.waiting import DEADLINE

MakeBox = Callable[..., Box]
FAKE = "fake:1"
CLIENTS = 16
ROUNDS = 20
PRICES = """
[pricing]
per_1k_tokens = { prompt = "1", cached = "0.5", completion = "4" }
"""
REAL_ROUNDS = {3, 9, 16}  # with the real model; its weights take longer to load


def rows(home: Path, sql: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(home / "pinaivu.db", timeout=30)) as connection:
        return connection.execute(sql).fetchall()


def receipt_of(box: Box, request_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(
        run_command("receipts", "show", request_id, home=box.home).stdout
    )
    run_command("receipts", "verify", request_id, home=box.home)  # fails unless every check holds
    return shown


# -- the server is killed --------------------------------------------------------------------------


class Swarm:
    """Clients that ask again and again, half of them streaming, until the server is gone."""

    def __init__(self, box: Box, model: str, tokens: tuple[int, int], seed: int) -> None:
        self.completed: list[str] = []
        self.cut_off = 0
        self._box, self._model, self._tokens = box, model, tokens
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(seed * 100 + n,), daemon=True)
            for n in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        dice = random.Random(number)
        try:
            with http_client(self._box) as client:
                while True:
                    wanted = body(self._model, dice.randint(*self._tokens), number % 4 != 0)
                    request_id = self._one(client, wanted)
                    with self._lock:
                        self.completed.append(request_id)
        except httpx.HTTPError:
            with self._lock:
                self.cut_off += 1

    @staticmethod
    def _one(client: httpx.Client, wanted: dict[str, Any]) -> str:
        """The id of a request whose answer was seen whole."""
        request_id = ""
        if not wanted["stream"]:
            answer = client.post(URL, json=wanted).raise_for_status().json()
            assert answer["choices"][0]["finish_reason"]
            return str(answer["request_id"])
        with client.stream("POST", URL, json=wanted) as got:
            got.raise_for_status()
            for line in got.iter_lines():
                if line == "data: [DONE]":
                    return request_id
                if line.startswith("data: "):
                    request_id = json.loads(line.removeprefix("data: "))["request_id"]
        raise httpx.ReadError("the stream ended without [DONE]")

    def join(self) -> None:
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive()


@pytest.mark.timeout(600)
def test_every_answer_that_was_seen_whole_has_its_receipt_after_a_kill(tmp_path: Path) -> None:
    """kill -9 of the server while 16 clients spend a budget, 20 times on one home; all accounts of
    what they have spent agree."""
    dice = random.Random(2)
    (tmp_path / "box.toml").write_text(PRICES)
    options = ("--config", str(tmp_path / "box.toml"), "--model", f"{FAKE}=fake:2")
    box = Box(tmp_path / "home", *options)
    key = run_command_json("keys", "create", "--budget", "1000", home=box.home)
    box.key = key["key"]
    completed: list[str] = []
    cut_off = 0
    total = Decimal(0)
    try:
        for number in range(ROUNDS):
            box.start()
            check_survivors(box.home, completed)
            if number in REAL_ROUNDS:
                swarm = Swarm(box, MODEL, (1, 4), number)
            else:
                swarm = Swarm(box, FAKE, (3, 40), number)
            wait_until(lambda: len(swarm.completed) >= 5, "first answers")  # noqa: B023
            time.sleep(dice.uniform(0, 0.3))
            box.kill()
            swarm.join()
            completed += swarm.completed
            cut_off += swarm.cut_off
            spending = spent(box.home, key["id"])
            assert len(set(spending.values())) == 1, spending
            assert spending["receipts"] > total
            total = spending["receipts"]
        box.start()
        check_survivors(box.home, completed)
        usage = box.http("GET", "/v1/usage").json()
        assert Decimal(usage["cost"]) == spent(box.home, key["id"])["receipts"] == total <= 1000
        assert len(set(completed)) == len(completed) >= 5 * ROUNDS
        assert cut_off >= 10 * ROUNDS  # the kills met requests under way
        for request_id in (completed[0], completed[-1]):
            receipt_of(box, request_id)
        shown = box.http("GET", f"/v1/receipts/{completed[-1]}").raise_for_status().json()
        assert shown["request_id"] == completed[-1]
    finally:
        box.end()


def check_survivors(home: Path, completed: list[str]) -> None:
    """Every completed request is stored with its receipt, and the account is whole."""
    assert rows(home, "PRAGMA integrity_check") == [("ok",)]
    receipts = {request_id for (request_id,) in rows(home, "SELECT request_id FROM receipts")}
    requests = {request_id for (request_id,) in rows(home, "SELECT request_id FROM requests")}
    assert set(completed) <= receipts
    # Receipt, usage row and the key's counters were one transaction each.
    assert receipts == requests
    assert rows(home, "SELECT sum(requests), sum(tokens) FROM keys") == rows(
        home, "SELECT count(*), coalesce(sum(prompt_tokens + completion_tokens), 0) FROM requests"
    )


def test_no_engine_survives_a_killed_server(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    streams = [StreamedChat(box, FAKE, 5000), StreamedChat(box, MODEL, 5000)]
    for stream in streams:
        stream.wait_for_text()
    pids = [engine["pid"] for engine in box.engines()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    box.kill()
    for pid in pids:
        wait_until(lambda: not alive(pid), f"the end of engine {pid}")  # noqa: B023
    for stream in streams:
        stream.join()
        assert not stream.done


# -- an engine is killed ---------------------------------------------------------------------------


def engine_of(box: Box, model: str) -> dict[str, Any]:
    return next(engine for engine in box.engines() if engine["model"] == model)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_stream_goes_on_when_its_engine_is_killed(new_box: MakeBox) -> None:
    """Others are not disturbed, the receipt shows both legs, the engine is back."""
    box = new_box("--model", f"{FAKE}=fake:20", "--model", "fake:2=fake:20", config=UNDRAFTED)
    beside = StreamedChat(box, "fake:2", 400)
    beside.wait_for_text(10)
    struck = StreamedChat(box, FAKE, 150)
    struck.wait_for_text(10)
    victim, other = engine_of(box, FAKE)["pid"], engine_of(box, "fake:2")["pid"]
    kill(victim)
    struck.check_whole(150)
    beside.check_whole(400)
    assert box.process.poll() is None

    receipt = receipt_of(box, struck.request_id)
    legs = receipt["proofs"]
    assert [leg["finish_reason"] for leg in legs] == ["engine_lost", "length"]
    assert [leg["leg"] for leg in legs] == [0, 1]
    assert all(leg["completion_tokens"] > 0 for leg in legs)
    assert sum(leg["completion_tokens"] for leg in legs) == 150
    assert legs[0]["sampling"]["seed"] == legs[1]["sampling"]["seed"]
    assert receipt["usage"] == {
        "prompt_tokens": struck.usage["prompt_tokens"],
        "completion_tokens": 150,
        "cached_tokens": 0,
    }
    assert receipt["finish_reason"] == "length"
    assert len(receipt_of(box, beside.request_id)["proofs"]) == 1

    later = box.chat(model=FAKE, max_tokens=3)
    assert later.status_code == 200
    assert engine_of(box, FAKE)["pid"] != victim
    assert engine_of(box, "fake:2")["pid"] == other
    assert box.http("GET", "/readyz").status_code == 200


def test_a_stream_of_the_real_model_goes_on_when_its_engine_is_killed(new_box: MakeBox) -> None:
    box = new_box()
    stream = StreamedChat(box, MODEL, 200)
    stream.wait_for_text(5)
    before = stream.text
    victim = engine_of(box, MODEL)["pid"]
    kill(victim)
    stream.join()
    assert stream.error is None and stream.done
    assert stream.finish_reason in ("length", "stop")
    assert stream.text.startswith(before) and len(stream.text) > len(before)
    receipt = receipt_of(box, stream.request_id)
    assert len(receipt["proofs"]) == 2
    assert receipt["usage"]["completion_tokens"] == stream.usage["completion_tokens"]
    assert box.chat(max_tokens=2).status_code == 200
    assert engine_of(box, MODEL)["pid"] != victim


def test_all_streams_of_a_killed_engine_go_on(new_box: MakeBox) -> None:
    """Many at once, and an answer that is not streamed among them."""
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    streams = [StreamedChat(box, FAKE, 300 + n) for n in range(12)]
    answers: list[httpx.Response] = []
    plain = threading.Thread(
        target=lambda: answers.append(box.chat(model=FAKE, max_tokens=310)), daemon=True
    )
    plain.start()
    for stream in streams:
        stream.wait_for_text(10)
    wait_until(lambda: engine_of(box, FAKE)["running"] == 13, "all to run")
    kill(engine_of(box, FAKE)["pid"])
    for number, stream in enumerate(streams):
        stream.check_whole(300 + number)
    plain.join(180)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 310
    assert len(receipt_of(box, answers[0].json()["request_id"])["proofs"]) == 2


def test_an_engine_that_is_killed_again_and_again_does_not_take_the_server_along(
    new_box: MakeBox,
) -> None:
    """After some deaths a request may be refused, with 503 and Retry-After; then it works again."""
    box = new_box("--model", f"{FAKE}=fake:20")
    statuses = []
    for _ in range(4):
        answer = box.chat(model=FAKE, max_tokens=2)
        statuses.append(answer.status_code)
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
        for engine in box.engines():
            if engine["pid"]:
                kill(engine["pid"])
    assert set(statuses) <= {200, 503} and statuses[0] == 200
    wait_until(lambda: box.chat(model=FAKE, max_tokens=2).status_code == 200, "its return")


def test_a_stream_goes_on_when_its_engine_hangs(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    stream = StreamedChat(box, FAKE, 200)
    stream.wait_for_text(10)
    hung = engine_of(box, FAKE)["pid"]
    os.kill(hung, signal.SIGSTOP)
    stream.check_whole(200)
    assert not alive(hung)
    assert len(receipt_of(box, stream.request_id)["proofs"]) == 2


# -- it is told to stop ----------------------------------------------------------------------------


def draining(box: Box) -> bool:
    return box.http("GET", "/readyz").status_code == 503


def test_sigterm_lets_a_stream_finish_and_refuses_new_requests(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    stream = StreamedChat(box, FAKE, 500)
    stream.wait_for_text(5)
    pid = engine_of(box, FAKE)["pid"]
    box.process.send_signal(signal.SIGTERM)
    wait_until(lambda: draining(box), "/readyz to fail")
    refused = box.chat(model=FAKE, max_tokens=2)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "no_nodes_available"
    assert box.http("GET", "/health").status_code == 200
    assert not stream.done  # all this happened while it ran
    stream.check_whole(500)
    assert box.process.wait(DEADLINE) == 0
    assert not alive(pid)
    assert receipt_of(box, stream.request_id)["finish_reason"] == "length"
    assert not (box.home / "run.json").exists()


def test_a_sigterm_that_reaches_the_engine_as_well_does_not_end_it_first(new_box: MakeBox) -> None:
    """systemd sends it to every process of the unit."""
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    stream = StreamedChat(box, FAKE, 200)
    stream.wait_for_text(10)
    os.kill(engine_of(box, FAKE)["pid"], signal.SIGTERM)
    box.process.send_signal(signal.SIGTERM)
    stream.check_whole(200)
    assert box.process.wait(DEADLINE) == 0
    assert len(receipt_of(box, stream.request_id)["proofs"]) == 1


def test_a_plain_answer_under_way_at_sigterm_arrives(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:20")
    answers: list[httpx.Response] = []
    plain = threading.Thread(
        target=lambda: answers.append(box.chat(model=FAKE, max_tokens=100)), daemon=True
    )
    plain.start()
    wait_until(lambda: box.engines() and box.engines()[0]["running"], "the request to run")
    assert box.stop() == 0
    plain.join(180)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 100


def test_a_second_sigterm_ends_it_at_once(new_box: MakeBox) -> None:
    """With a stream that would take many minutes; its engine goes too."""
    box = new_box("--model", f"{FAKE}=fake:200", config=UNDRAFTED)
    stream = StreamedChat(box, FAKE, 5000)
    stream.wait_for_text()
    pid = engine_of(box, FAKE)["pid"]
    box.process.send_signal(signal.SIGTERM)
    wait_until(lambda: draining(box), "/readyz to fail")
    time.sleep(0.5)  # two at the same moment are one: a signal to a group may come twice
    box.process.send_signal(signal.SIGTERM)
    assert box.process.wait(DEADLINE) != 0
    stream.join()
    assert not stream.done
    wait_until(lambda: not alive(pid), "the end of the engine")


def test_a_request_that_outlasts_the_drain_is_cancelled_with_its_receipt(new_box: MakeBox) -> None:
    config = "[server]\ndrain_seconds = 0.5\n" + UNDRAFTED
    box = new_box("--model", f"{FAKE}=fake:50", config=config)
    stream = StreamedChat(box, FAKE, 5000)
    stream.wait_for_text(3)
    assert box.stop() == 0
    stream.join()
    receipt = receipt_of(box, stream.request_id)
    assert receipt["finish_reason"] == "cancelled"
    assert 0 < receipt["usage"]["completion_tokens"] < 5000


def test_a_box_with_nothing_to_do_stops_at_once_with_0(new_box: MakeBox) -> None:
    assert new_box().stop() == 0


# -- the client goes away --------------------------------------------------------------------------


def check_cancelled(box: Box, max_tokens: int) -> dict[str, Any]:
    """The only request of this box was cancelled, says so, and its engine is empty."""
    wait_until(lambda: rows(box.home, "SELECT request_id FROM requests"), "the receipt")
    ((request_id,),) = rows(box.home, "SELECT request_id FROM requests")
    receipt = receipt_of(box, request_id)
    assert receipt["finish_reason"] == "cancelled"
    assert [proof["finish_reason"] for proof in receipt["proofs"]] == ["cancelled"]
    assert 0 < receipt["usage"]["completion_tokens"] < max_tokens

    def empty() -> bool:
        engine = engine_of(box, FAKE)
        return not (engine["running"] or engine["waiting"] or engine["kv_used"])

    wait_until(empty, "the engine to be empty")
    (usage,) = run_command_json("usage", home=box.home)["by_model"]
    assert usage["completion_tokens"] == receipt["usage"]["completion_tokens"]
    return receipt


def test_a_client_that_leaves_its_stream_stops_it(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    stream = StreamedChat(box, FAKE, 4000)
    stream.wait_for_text(5)
    stream.leave()
    receipt = check_cancelled(box, 4000)
    assert receipt["request_id"] == stream.request_id
    assert receipt["usage"]["completion_tokens"] >= len(stream.text)


def test_a_client_that_leaves_before_its_plain_answer_stops_it(new_box: MakeBox) -> None:
    box = new_box("--model", f"{FAKE}=fake:20", config=UNDRAFTED)
    assert box.chat(model=FAKE, max_tokens=1).status_code == 200  # the engine is up
    before = rows(box.home, "SELECT request_id FROM requests")
    with http_client(box, 3) as client, pytest.raises(httpx.ReadTimeout):
        client.post(URL, json=body(FAKE, 4000, stream=False))
    wait_until(
        lambda: len(rows(box.home, "SELECT request_id FROM requests")) == 2, "the second receipt"
    )
    (request_id,) = set(rows(box.home, "SELECT request_id FROM requests")) - set(before)
    receipt = receipt_of(box, request_id[0])
    assert receipt["finish_reason"] == "cancelled"
    assert 0 < receipt["usage"]["completion_tokens"] < 4000
    wait_until(lambda: engine_of(box, FAKE)["kv_used"] == 0, "the engine to be empty")
    engine = engine_of(box, FAKE)
    assert engine["running"] == engine["waiting"] == 0


# -- an engine that cannot be had ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_cannot_be_loaded_is_503_and_the_server_lives(
    new_box: MakeBox, tmp_path: Path, stream: bool
) -> None:
    """A file with a good header, of which llama.cpp misses what makes it a model."""
    file = tmp_path / "broken.gguf"
    file.write_bytes(gguf_files.valid())
    box = new_box("--model", f"broken:1={file}", "--model", f"{FAKE}=fake:1")
    for _ in range(2):  # tried, then in its pause
        answer = box.chat(model="broken:1", max_tokens=2, stream=stream)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "no_nodes_available"
        message = answer.json()["error"]["message"]
        assert "broken:1" in message and "could not be loaded" in message
    assert box.chat(model=FAKE, max_tokens=2).status_code == 200
    assert box.http("GET", "/readyz").status_code == 200
    assert [engine["model"] for engine in box.engines()] == [FAKE]
    assert rows(box.home, "SELECT model FROM requests") == [(FAKE,)]
