"""Limits, budgets and deadlines as clients of a real server meet them."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.in_process_command import make_key, run_command, run_command_json
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.spending import spent

USER = [{"role": "user", "content": "hi"}]
CONFIG = """
[engine]
drafting = false
[pricing]
per_1k_tokens = { prompt = "1", cached = "0.5", completion = "4" }
[[model]]
name = "fast:1"
path = "fake:0"
context = 256
[[model]]
name = "slow:1"
path = "fake:30"
context = 4096
"""


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(config=CONFIG)


def post(box: Box, key: str, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {"model": "fast:1", "messages": USER, "max_tokens": 4, **more}
    return box.http("POST", "/v1/chat/completions", key=key, json=body, headers=headers)


def error(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    message: str = answer.json()["error"]["message"]
    assert answer.json()["detail"] == message
    if status == 429:
        assert int(answer.headers["retry-after"]) >= 1
    return message


# -- requests and tokens per minute ----------------------------------------------------------------


def test_sixty_a_minute_for_64_clients(box: Box) -> None:
    """Exactly 60 pass, however they come; the rest are told when to come back."""
    key, _ = make_key(box, "--rpm", "60")
    began = time.monotonic()
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda _: post(box, key), range(128)))
    assert time.monotonic() - began < 60, "the machine was too slow to prove anything"
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == 60 and statuses.count(429) == 68
    refused = [answer for answer in answers if answer.status_code == 429]
    for answer in refused:
        message = error(answer, 429, "rate_limit_exceeded")
        wait = int(answer.headers["retry-after"])
        assert "60 requests per minute (rpm)" in message and f"{wait} s" in message
        assert wait <= 60
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    # Other answers to the same key carry the headers too; those to a key without limits do not.
    listed = box.http("GET", "/v1/models", key=key)
    assert listed.headers["x-ratelimit-limit-requests"] == "60"
    assert "x-ratelimit-limit-requests" not in box.http("GET", "/v1/models").headers


def test_the_sdk_comes_back_when_it_is_told(tmp_path: Path) -> None:
    """Its automatic retry waits as Retry-After says, and succeeds: by itself it would have given up
    after two seconds."""
    started = Box(tmp_path / "home", "--model", "fast:1=fake:0").start()
    try:
        # What was is read when the key is first used.
        key, name = make_key(started, "--rpm", "2")
        remember(started, name, [time.time() - 48, time.time() - 40])
        client = openai.OpenAI(base_url=f"{started.url}/v1", api_key=key, max_retries=2)
        ask: Any = {"model": "fast:1", "messages": USER, "max_tokens": 1}
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).chat.completions.create(**ask)
        assert int(caught.value.response.headers["retry-after"]) > 2
        assert client.chat.completions.create(**ask).choices
    finally:
        started.end()


def remember(box: Box, key_id: str, moments: list[float]) -> None:
    """Requests of the past, as a box finds them that was started anew."""
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        for number, moment in enumerate(moments):
            database.execute(
                "INSERT INTO requests (request_id, key_id, created_at, model, node_id,"
                " finish_reason, prompt_tokens, cached_tokens, completion_tokens, amount, total_ms)"
                " VALUES (?, ?, ?, 'm', 'n', 'stop', 1, 0, 1, 0, 1)",
                (f"req_{number}", key_id, int(moment * 1000)),
            )


def test_tokens_are_reserved_and_then_corrected(box: Box) -> None:
    """The prompt as the engine counts it, and max_tokens; at the end what was really used."""
    key, _ = make_key(box, "--tpm", "400")
    prompt = post(box, key, max_tokens=1).json()["usage"]["prompt_tokens"]
    used = 400 - int(post(box, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"])
    assert used == 2 * (prompt + 1)
    room = 400 - used - prompt
    body = {"model": "slow:1", "messages": USER, "stream": True}
    with openai.OpenAI(base_url=f"{box.url}/v1", api_key=key, max_retries=0) as client:
        stream = client.chat.completions.create(**body, max_tokens=room)  # type: ignore[call-overload]
        next(iter(stream))
        message = error(post(box, key, max_tokens=1), 429, "rate_limit_exceeded")
        assert "400 tokens per minute (tpm" in message
        stream.close()  # the client leaves: what was not used is there again
        wait_until(lambda: post(box, key, max_tokens=1).status_code == 200, "tokens given back")


def test_a_request_above_a_limit_of_its_key_is_a_400_with_the_numbers(box: Box) -> None:
    key, _ = make_key(box, "--tpm", "100")
    message = error(post(box, key, max_tokens=200), 400, "exceeds_key_limit")
    assert "100 tokens per minute (tpm)" in message and "max_tokens" in message
    # Without a limit of its own the answer gets what the key allows.
    answer = post(box, key, max_tokens=None)
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] <= 100


def test_limits_survive_a_restart(new_box: Any) -> None:
    for end in ("stop", "kill"):
        started = new_box("--model", "fast:1=fake:0")
        key, _ = make_key(started, "--rpm", "3", "--tpm", "1000")
        for _ in range(3):
            assert post(started, key).status_code == 200
        left = started.http("GET", "/v1/models", key=key).headers["x-ratelimit-remaining-tokens"]
        getattr(started, end)()
        started.start()
        error(post(started, key), 429, "rate_limit_exceeded")
        again = started.http("GET", "/v1/models", key=key).headers
        assert again["x-ratelimit-remaining-tokens"] == left


def test_a_limit_that_is_changed_holds_for_the_next_request(box: Box) -> None:
    key, name = make_key(box, "--rpm", "1")
    assert post(box, key).status_code == 200
    error(post(box, key), 429, "rate_limit_exceeded")
    run_command("keys", "edit", name, "--rpm", "2", home=box.home)
    assert post(box, key).status_code == 200
    error(post(box, key), 429, "rate_limit_exceeded")


def test_every_endpoint_that_runs_a_model_counts(box: Box) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "completions": {"prompt": "x", "max_tokens": 1},
        "embeddings": {"input": "x"},
        "responses": {"input": "x", "max_output_tokens": 16},
        "messages": {"messages": USER, "max_tokens": 1},
        "chat/completions": {"messages": USER, "max_tokens": 1},
    }
    for path, body in bodies.items():
        key, _ = make_key(box, "--rpm", "1", "--tpm", "200")
        first, second = (
            box.http("POST", f"/v1/{path}", key=key, json={"model": "fast:1", **body})
            for _ in range(2)
        )
        assert first.status_code == 200, (path, first.text)
        assert second.status_code == 429, path
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 200


# -- places and queues -----------------------------------------------------------------------------


def test_places_of_a_key_and_its_queue(box: Box) -> None:
    """Two run, of two more one waits its turn, the other is refused at once."""
    key, name = make_key(box, "--max-parallel", "2", "--max-queue", "1")
    body = {"model": "slow:1", "messages": USER, "max_tokens": 200}
    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(lambda: post(box, key, **body)) for _ in range(2)]

        def full() -> bool:
            engines = [one for one in box.engines() if one["model"] == "slow:1"]
            return bool(engines) and engines[0]["running"] == 2

        wait_until(full, "two to run")
        ask = {**body, "max_tokens": 1}
        more = [threads.submit(lambda: post(box, key, **ask)) for _ in range(2)]
        wait_until(lambda: any(one.done() for one in more), "one to be refused")
        (refused,) = (one.result() for one in more if one.done())
        message = error(refused, 429, "rate_limit_exceeded")
        assert "2 requests at a time (max_parallel) and 1 that wait (max_queue)" in message
        assert [one.result().status_code for one in running] == [200, 200]
        assert sorted(one.result().status_code for one in more) == [200, 429]
    assert post(box, key).status_code == 200
    shown = run_command_json("keys", "show", name, home=box.home)
    assert shown["id"] == name


def test_leaving_the_queue_frees_the_place(box: Box) -> None:
    key, _ = make_key(box, "--max-parallel", "1", "--max-queue", "1")
    with ThreadPoolExecutor(1) as threads:
        body = {"model": "slow:1", "messages": USER, "max_tokens": 80}
        running = threads.submit(lambda: post(box, key, **body))
        headers = {"Authorization": f"Bearer {key}"}

        def leave() -> bool:
            try:
                httpx.post(
                    f"{box.url}/v1/chat/completions", json=body, headers=headers, timeout=0.3
                )
            except httpx.TimeoutException:
                return True
            return False

        wait_until(leave, "a client to leave while it waits")
        second = wait_until(
            lambda: (answer := post(box, key)).status_code == 200 and answer, "the place"
        )
        assert second.status_code == 200 and running.result().status_code == 200


# -- deadlines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow_box(module_box: StartBox) -> Box:
    """One sequence at a time."""
    return module_box(config=CONFIG.replace("[engine]\n", "[engine]\nmax_sequences = 1\n"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["header", "body"])
def test_a_request_that_cannot_start_in_time_is_refused(
    narrow_box: Box, how: str, stream: bool
) -> None:
    long = {"model": "slow:1", "messages": USER, "max_tokens": 100}
    ask: dict[str, Any] = {"model": "slow:1", "max_tokens": 1, "stream": stream}
    ask |= {"headers": {"x-request-timeout": "0.2"}} if how == "header" else {}
    ask |= {"pinaivu": {"timeout": 0.2}} if how == "body" else {}
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: post(narrow_box, narrow_box.key, **long))
        wait_until(lambda: narrow_box.engines() and narrow_box.engines()[0]["running"], "a run")
        refused = post(narrow_box, narrow_box.key, **ask)
        message = error(refused, 503, "deadline_exceeded")
        assert "within 0.2 s" in message and "would wait about" in message
        assert int(refused.headers["retry-after"]) >= 1
        assert not running.done()
        assert running.result().status_code == 200
    # With room it starts at once, and a deadline does not cut what has begun.
    ask |= {"headers": {"x-request-timeout": "10"}} if how == "header" else {}
    ask |= {"pinaivu": {"timeout": 10}} if how == "body" else {}
    assert post(narrow_box, narrow_box.key, **{**ask, "max_tokens": 100}).status_code == 200


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "1e3", "25h", "9" * 400])
def test_an_invalid_deadline_is_refused(box: Box, value: str) -> None:
    answer = post(box, box.key, headers={"x-request-timeout": value})
    assert answer.status_code == 422 and "x-request-timeout" in answer.text


# -- budgets ---------------------------------------------------------------------------------------


def test_a_budget_holds_under_50_parallel_requests(box: Box) -> None:
    """Never more than the budget, and every book says the same to the last decimal."""
    key, name = make_key(box, "--budget", "1.00 per 30d")
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda n: post(box, key, max_tokens=5 + n % 40), range(150)))
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 402, 429} and 200 in statuses
    while (last := post(box, key, max_tokens=None)).status_code == 200:
        pass  # what is left is used up, to the last token that it pays for
    message = error(last, 402, "budget_exceeded")
    assert "1.00 per 30d" in message and "wait until 20" in message
    books = spent(box.home, name)
    assert len(set(books.values())) == 1, books
    assert Decimal("0.9") < books["receipts"] <= 1
    usage = box.http("GET", "/v1/usage", key=key).json()
    assert Decimal(usage["cost"]) == books["receipts"]
    with pytest.raises(openai.APIStatusError) as caught:
        box.client_with(key).chat.completions.create(model="fast:1", messages=USER)
    assert caught.value.status_code == 402
    run_command("keys", "edit", name, "--budget", "2 per 30d", home=box.home)
    assert post(box, key).status_code == 200


def test_a_budget_begins_anew_with_its_period(box: Box) -> None:
    key, _ = make_key(box, "--budget", "0.1 per 10s")
    while (last := post(box, key, max_tokens=10)).status_code == 200:
        pass
    error(last, 402, "budget_exceeded")
    wait_until(lambda: post(box, key, max_tokens=10).status_code == 200, "the next period")


def test_kinds_of_tokens_have_prices_of_their_own_and_keys_too(box: Box) -> None:
    cheap, _ = make_key(box, "--price", "fast:*=0.1/0/0.2")
    for key, (prompt, cached, made) in (
        (box.key, ("1", "0.5", "4")),
        (cheap, ("0.1", "0", "0.2")),
    ):
        for _ in range(2):
            answer = post(box, key, messages=[{"role": "user", "content": "the same " * 9}])
            usage = answer.json()["usage"]
            found = usage["prompt_tokens_details"]["cached_tokens"]
            anew = usage["prompt_tokens"] - found
            due = anew * Decimal(prompt) + found * Decimal(cached)
            due += usage["completion_tokens"] * Decimal(made)
            path = f"/v1/receipts/{answer.json()['request_id']}"
            receipt = box.http("GET", path, key=key)
            assert Decimal(receipt.json()["payment_amount"]) == due / 1000
            file = box.home.parent / "receipt.json"
            file.write_bytes(receipt.content)
            run_command("receipts", "verify", str(file), home=box.home)
    assert found > 0  # or the price of cached tokens was not looked at
