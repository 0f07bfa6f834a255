"""Responses that run in the background: polled, streamed again, cancelled; none runs for ever."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.gateway.request import Failed, RequestEvent
from pinaivu_box.server.background import Background, replayed
from pinaivu_box.store import responses as stored
from pinaivu_box.store.database import Database
from tests.support.process_box import UNDRAFTED, Box, StartBox, wait_until
from tests.support.stored_responses import client_with_new_key, stored_rows

FAST, SLOW = "fast:1", "slow:1"  # the slow one says 3,500 tokens in three minutes
MODELS = ("--model", f"{FAST}=fake:0", "--model", f"{SLOW}=fake:50")
MOST = 4
CONFIG = f"{UNDRAFTED}\n[retention]\nresponses_per_key = {MOST}\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def here(module_box: StartBox) -> Box:
    return module_box(*MODELS, config=CONFIG)


@pytest.fixture
def client(here: Box) -> Any:
    return client_with_new_key(here)


def begin(client: Any, **more: Any) -> Any:
    options = {"model": SLOW, "input": "hi", "max_output_tokens": 3500, **more}
    return client.responses.create(background=True, **options)


def status(client: Any, made: Any) -> str:
    return str(client.responses.retrieve(made.id).status)


def wait_for(client: Any, made: Any, *wanted: str) -> Any:
    def there() -> Any:
        found = client.responses.retrieve(made.id)
        return found if found.status in wanted else None

    return wait_until(there, f"one of {wanted}")


def speaking(client: Any, made: Any) -> None:
    wait_until(lambda: client.responses.retrieve(made.id).output_text, "the first words")


def ended(client: Any, made: Any) -> Any:
    """Once it is on disk."""

    def there() -> Any:
        found = client.responses.retrieve(made.id)
        return found if found.usage else None

    return wait_until(there, "the end")


def receipt(here: Box, made: Any) -> dict[str, Any]:
    path = f"/v1/receipts/{made.request_id}"
    wait_until(lambda: here.http("GET", path).status_code == 200, "the receipt")
    return dict(json.loads(here.http("GET", path).json()["signed_receipt"]))


def test_it_is_polled_until_it_is_what_it_would_be_in_the_foreground(
    here: Box, client: Any
) -> None:
    options = {"model": FAST, "input": "hi", "max_output_tokens": 40, "metadata": {"a": "b"}}
    made = begin(client, **options)
    assert made.status in ("queued", "in_progress") and made.background
    assert made.output == [] and made.usage is None
    done = wait_for(client, made, "incomplete")
    plain = client.responses.create(**options)
    assert done.output_text == plain.output_text and done.output_text
    assert done.usage.output_tokens == plain.usage.output_tokens == 40
    for one in (made, done, plain):
        Response.model_validate(one.to_dict())
    assert receipt(here, done)["usage"]["completion_tokens"] == 40
    (item,) = client.responses.input_items.list(made.id).data
    assert item.content[0].text == "hi"
    more = {"model": FAST, "input": "more", "max_output_tokens": 1}
    after = [client.responses.create(previous_response_id=one.id, **more) for one in (done, plain)]
    assert after[0].usage.input_tokens == after[1].usage.input_tokens > done.usage.input_tokens


def test_it_is_cancelled_as_often_as_you_like(here: Box, client: Any) -> None:
    made = begin(client)
    speaking(client, made)
    with pytest.raises(openai.BadRequestError, match="has not ended yet"):
        client.responses.create(model=FAST, input="more", previous_response_id=made.id)
    for _ in range(2):
        assert client.responses.cancel(made.id).status == "cancelled"
    found = ended(client, made)
    assert found.status == "cancelled" and found.output_text
    assert 0 < found.usage.output_tokens < 3500
    assert [item.status for item in found.output] == ["incomplete"]
    assert receipt(here, found)["finish_reason"] == "cancelled"


def test_ended_foreground_and_foreign_responses_cannot_be_cancelled(here: Box, client: Any) -> None:
    done = begin(client, model=FAST, max_output_tokens=4)
    wait_for(client, done, "incomplete")
    assert client.responses.cancel(done.id).status == "incomplete"
    plain = client.responses.create(model=FAST, input="hi", max_output_tokens=4)
    with pytest.raises(openai.BadRequestError, match="not created with background"):
        client.responses.cancel(plain.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_unknown")
    running = begin(client)
    stranger = here.http("POST", "/v1/admin/keys", json={"name": "stranger"}).json()["key"]
    for call in ("retrieve", "cancel", "delete"):
        with pytest.raises(openai.NotFoundError):
            getattr(here.client_with(stranger).responses, call)(running.id)
    assert status(client, running) in ("queued", "in_progress")
    client.responses.cancel(running.id)


def test_background_needs_store(client: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="background needs store"):
        begin(client, store=False)


# -- streams ---------------------------------------------------------------------------------------


def numbers(events: list[Any]) -> list[int]:
    return [event.sequence_number for event in events]


def said(events: list[Any]) -> str:
    return "".join(one.delta for one in events if one.type == "response.output_text.delta")


def test_a_stream_is_gone_on_with_where_it_broke_off(client: Any) -> None:
    stream = begin(client, max_output_tokens=60, stream=True)
    first = [next(stream) for _ in range(12)]
    stream.close()
    kinds = ["response.created", "response.queued", "response.in_progress"]
    assert [event.type for event in first[:3]] == kinds
    assert first[0].response.status == "queued"
    made = first[0].response
    again = {"response_id": made.id, "stream": True}
    rest = list(client.responses.retrieve(**again, starting_after=11))
    assert numbers(first + rest) == list(range(len(first + rest)))
    assert rest[-1].type == "response.incomplete"
    whole = client.responses.retrieve(made.id)
    assert said(first + rest) == whole.output_text == rest[-1].response.output_text
    # It has ended now, and is told as it was.
    replayed = list(client.responses.retrieve(**again))
    assert [one.to_dict() for one in replayed] == [one.to_dict() for one in first + rest]
    assert numbers(list(client.responses.retrieve(**again, starting_after=20))) == numbers(
        replayed[21:]
    )
    known = TypeAdapter(ResponseStreamEvent)
    for event in replayed:
        known.validate_python(event.to_dict())
    plain = client.responses.create(model=FAST, input="hi", max_output_tokens=4)
    with pytest.raises(openai.BadRequestError, match="not created with background"):
        client.responses.retrieve(plain.id, stream=True)


def test_a_stream_tells_of_what_comes(client: Any) -> None:
    made = begin(client)
    stream = client.responses.retrieve(made.id, stream=True)
    seen = [next(stream) for _ in range(20)]
    assert said(seen)
    client.responses.cancel(made.id)
    seen += list(stream)
    assert seen[-1].type == "response.cancelled"
    assert numbers(seen) == list(range(len(seen)))
    assert said(seen) == client.responses.retrieve(made.id).output_text


def test_deleting_a_running_response_stops_it(here: Box, client: Any) -> None:
    made = begin(client)
    stream = client.responses.retrieve(made.id, stream=True)
    next(stream)
    client.responses.delete(made.id)
    assert list(stream)[-1].type == "response.cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    assert made.id not in stored_rows(here)


# -- limits ----------------------------------------------------------------------------------------


def test_it_holds_the_place_of_its_key(here: Box) -> None:
    policy = {"max_parallel": 1, "max_queue": 0}
    made = here.http("POST", "/v1/admin/keys", json={"account": "owner", "policy": policy}).json()
    client = here.client_with(made["key"])
    running = begin(client)
    with pytest.raises(openai.RateLimitError, match="max_parallel"):
        begin(client)
    client.responses.cancel(running.id)
    ended(client, running)
    begin(client, model=FAST, max_output_tokens=1)


def test_a_key_that_is_revoked_at_once_ends_it(here: Box, client: Any) -> None:
    made = here.http("POST", "/v1/admin/keys", json={"account": "owner"}).json()
    running = begin(here.client_with(made["key"]))
    speaking(client, running)
    path = f"/v1/admin/keys/{made['id']}/revoke"
    assert here.http("POST", path, params={"now": "true"}).json()["stopped"] == 1
    found = wait_for(client, running, "failed")
    assert "revoked" in found.error.message
    assert receipt(here, running)["finish_reason"] == "cancelled"


def test_a_running_response_counts_as_stored_and_is_not_evicted(here: Box, client: Any) -> None:
    running = begin(client)
    speaking(client, running)
    plain = [
        client.responses.create(model=FAST, input="hi", max_output_tokens=1) for _ in range(MOST)
    ]
    kept = stored_rows(here)  # whose sums are right
    assert plain[0].id not in kept and {one.id for one in (running, *plain[1:])} <= set(kept)
    client.responses.cancel(running.id)
    ended(client, running)
    row = stored_rows(here)[running.id]
    assert row["events"]
    assert row["bytes"] == sum(len(row[name]) for name in ("input", "body", "events"))


# -- ends ------------------------------------------------------------------------------------------


def test_one_that_fails_says_why_and_is_not_gone_on_with(client: Any) -> None:
    made = begin(client, model=FAST, input="x" * 10_000)
    found = wait_for(client, made, "failed")
    assert found.error.code == "context_length_exceeded" and found.error.message
    (last,) = list(client.responses.retrieve(made.id, stream=True, starting_after=1))
    assert last.type == "response.failed" and last.response.error == found.error
    with pytest.raises(openai.BadRequestError, match="has failed"):
        client.responses.create(model=FAST, input="more", previous_response_id=made.id)


def test_none_outlives_its_box(new_box: Callable[..., Box]) -> None:
    box = new_box(*MODELS, config=f"{UNDRAFTED}\n[server]\ndrain_seconds = 0.1\n")
    killed = begin(box.client)
    speaking(box.client, killed)
    box.kill()
    box.start()
    found = box.client.responses.retrieve(killed.id)
    assert found.status == "failed" and "was stopped" in found.error.message
    (last,) = list(box.client.responses.retrieve(killed.id, stream=True, starting_after=7))
    assert (last.type, last.sequence_number) == ("response.failed", 8)
    assert box.client.responses.cancel(killed.id).status == "failed"
    with pytest.raises(openai.BadRequestError, match="has failed"):
        box.client.responses.create(model=FAST, input="more", previous_response_id=killed.id)
    stopped = begin(box.client)
    speaking(box.client, stopped)
    assert box.stop() == 0
    box.start()
    found = box.client.responses.retrieve(stopped.id)
    assert found.status == "failed" and "was stopped" in found.error.message
    assert found.output_text and found.usage.output_tokens > 0
    last = list(box.client.responses.retrieve(stopped.id, stream=True))[-1]
    assert last.type == "response.failed"


# -- bounds ----------------------------------------------------------------------------------------


def test_large_ones_hold_the_room_of_their_bodies_until_they_have_ended(here: Box) -> None:
    """As many as an account may send at a time: the next one waits for the end of one of them."""
    client = client_with_new_key(here)
    large: dict[str, Any] = {"extra_body": {"session_id": "a" * 9_000_000}}
    running = [begin(client, **large) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        last = pool.submit(begin, client, **large)
        small = begin(client)
        speaking(client, small)
        assert not last.done()
        client.responses.cancel(running[0].id)
        running.append(last.result())
    for one in [*running[1:], small]:
        client.responses.cancel(one.id)


def test_streams_of_one_response_are_bounded(here: Box, client: Any) -> None:
    made = begin(client)
    url = f"{here.url}/v1/responses/{made.id}?stream=true"
    headers = {"Authorization": f"Bearer {client.api_key}"}
    with httpx.Client(headers=headers, timeout=60, trust_env=False) as http, ExitStack() as stack:
        streams = [stack.enter_context(http.stream("GET", url)) for _ in range(16)]
        assert {one.status_code for one in streams} == {200}
        refused = http.get(url)
        assert refused.status_code == 429 and "16 streams" in refused.json()["error"]["message"]
        streams[0].close()
        wait_until(lambda: _opens(http, url), "a place for another")
    client.responses.cancel(made.id)


def _opens(http: httpx.Client, url: str) -> bool:
    with http.stream("GET", url) as answer:
        return answer.status_code == 200


@pytest.mark.anyio
async def test_a_stream_is_replayed_from_any_event_on() -> None:
    events = [b"event: e\ndata: " + b"%d" % n * size + b"\n\n"
              for n, size in enumerate((1, 70_000, 3, 200_000, 1, 65_536, 2))]  # fmt: skip
    kept = zlib.compress(b"".join(events))
    for after in range(-1, len(events)):
        parts = [part async for part in replayed(kept, after)]
        assert b"".join(parts) == b"".join(events[after + 1 :])
        assert max(map(len, parts), default=0) <= 65536 + 1


@pytest.mark.anyio
async def test_one_whose_answer_cannot_be_written_has_failed(tmp_path: Path) -> None:
    class Answer:
        """Of a model that says what no encoder takes."""

        storage_limits = {"max_count": 9, "max_bytes": 9**9}  # noqa: RUF012

        def queue(self) -> list[bytes]:
            return []

        def whole(self) -> Any:
            return SimpleNamespace(id="resp_1")

        async def insert(self) -> None:
            body = json.dumps({"status": "queued", "background": True}).encode()
            row = stored.StoredResponse(
                "resp_1", "acct_owner", None, 0, b"[]", body, "key", stored.QUEUED
            )
            await stored.insert(database, row, **self.storage_limits)

        def encode_each(self, _events: Any) -> list[bytes]:
            return ["\ud83d".encode()]

    left: list[bool] = []
    async with Database(tmp_path / "box.db") as database:
        events: Mailbox[RequestEvent] = Mailbox()
        call = SimpleNamespace(
            key=SimpleNamespace(account_id="acct_owner"),
            box=SimpleNamespace(database=database),
            request=SimpleNamespace(scope={"state": {"release_body": lambda: left.append(True)}}),
            running=SimpleNamespace(events=events, cancel=lambda: None),
            note=lambda _event: None,
            failed=Failed,
        )
        background = Background()
        made = await background.start(cast("Any", call), cast("Any", Answer()))
        assert background.find("resp_1", "acct_owner") is made and not left
        events.put(cast("Any", object()))
        await made.task
        found = await stored.find(database, "resp_1", "acct_owner")
        assert found and found.status == "failed" and "its log says why" in found.body.decode()
        assert left == [True] and background.find("resp_1", "acct_owner") is None
