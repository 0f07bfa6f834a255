"""What peers can learn of others' prompts from the cache of the box that serves them: nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pinaivu_box.engine.messages import SamplingDefaults
from pinaivu_box.gateway import scopes
from pinaivu_box.legs import server
from pinaivu_box.legs import wire as leg_wire
from tests.support.fake_coordinator import accept, ask, served, sign
from tests.support.fake_model import FAKE
from tests.support.three_boxes import ThreeBoxes

pytestmark = pytest.mark.anyio
SECRET = "The launch code of customer A is 7391-XQ"
GUESSES = (SECRET, SECRET[:-1] + "?", "?" * len(SECRET))


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The tags of the tasks that ben is given."""
    tags: list[str | None] = []

    def spy(node_id: str, tag: str | None, request_id: str) -> str:
        tags.append(tag)
        return scopes.peer_scope(node_id, tag, request_id)

    monkeypatch.setattr(server, "peer_scope", spy)
    return tags


async def key_at(world: ThreeBoxes, account: str | None = None) -> tuple[str, str]:
    """A key of anna's whose requests go to ben, and its account."""
    body = {"account": account, "policy": {"peers": ["ben"]}}
    made = (await world.anna.http("POST", "/v1/admin/keys", json=body)).json()
    return made["key"], made["account"]


async def found(box: Any, text: str, secret: str | None = None, **more: Any) -> int:
    answer = await box.chat(text, secret, max_tokens=1, **more)
    assert answer.status_code == 200, answer.text
    number: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return number


async def asked(world: ThreeBoxes, text: str = SECRET, pays: bool = True, **more: Any) -> int:
    """What carl's request finds at ben."""
    wanted = msgspec.structs.replace(ask(world, text, **more), pays_prompt=pays)
    stream, proved = await served(world, wanted)
    await accept(stream, sign(world, proved))
    number: int = msgspec.json.decode(proved.signed)["cached_tokens"]
    return number


async def test_accounts_of_one_peer_are_apart(three: ThreeBoxes, tags: list[str | None]) -> None:
    victim, account = await key_at(three)
    assert await found(three.anna, SECRET, victim) == 0
    for guess in GUESSES:
        guesser, _ = await key_at(three)
        assert await found(three.anna, guess, guesser) == 0
    again, _ = await key_at(three, account)
    assert await found(three.anna, SECRET, again) > len(SECRET)
    first, *others, last = tags
    assert first == last and first not in others and len(set(others)) == 3


async def test_a_peer_and_the_box_itself_are_apart(three: ThreeBoxes) -> None:
    text = "Of this box alone: " + SECRET
    assert await found(three.ben, text) <= len("<|im_start|>user\n")  # it has been asked before
    victim, _ = await key_at(three)
    assert await found(three.anna, text, victim) == 0
    assert await asked(three, text) == 0
    assert await found(three.ben, text) > len(text)


async def test_the_tag_of_another_peer_opens_nothing(
    three: ThreeBoxes, tags: list[str | None]
) -> None:
    victim, _ = await key_at(three)
    await found(three.anna, SECRET, victim)
    tag = tags[0]
    assert tag is not None
    assert await asked(three, SECRET, tag=tag) == 0
    assert await asked(three, SECRET, tag=tag) > len(SECRET)  # its own


async def test_one_that_says_no_tag_only_shares_within_a_request(three: ThreeBoxes) -> None:
    """A box of an older version, whose accounts nobody here can tell apart."""
    wanted = ask(three, SECRET)
    request_id, nonce = wanted.task.request_id, wanted.task.nonce
    same: dict[str, Any] = {"request_id": request_id, "nonce": nonce}
    assert await asked(three, **same) == 0
    assert await asked(three, choice=1, pays=False, **same) > len(SECRET)
    assert await asked(three) == 0


async def test_another_leg_finds_what_its_account_has_there(three: ThreeBoxes) -> None:
    more: dict[str, Any] = {"leg": 1}
    assert await asked(three, "A leg. " + SECRET, tag="1" * 32) == 0
    assert await asked(three, "A leg. " + SECRET, tag="1" * 32, **more) > len(SECRET)
    assert await asked(three, "A leg. " + SECRET, tag="2" * 32, **more) == 0


async def test_without_cache_prompt_nothing_is_kept_there(
    three: ThreeBoxes, tags: list[str | None]
) -> None:
    key, _ = await key_at(three)
    text = "Not to be kept: " + SECRET
    assert await found(three.anna, text, key, cache_prompt=False) == 0
    assert await found(three.anna, text, key) == 0
    assert await found(three.anna, text, key, cache_prompt=False) == 0
    assert [tag is None for tag in tags] == [True, False, True]


async def test_shared_prefixes_are_not_for_peers(three: ThreeBoxes) -> None:
    named = "You are the assistant of ACME. "
    settings, placement = three.ben.box.settings, three.ben.box.placement
    before = settings.current
    settings.current = replace(before, shared_prefixes=(named.strip(),))
    placement.reloaded()
    try:
        await found(three.ben, named + "One.")
        other = await three.ben.http("POST", "/v1/admin/keys", json={})
        assert await found(three.ben, named + "Two.", other.json()["key"]) > len(named)
        assert await asked(three, named + "Three.") == 0
        key, _ = await key_at(three)
        assert await found(three.anna, named + "Four.", key) == 0
    finally:
        settings.current = before
        placement.reloaded()


def test_a_peer_of_the_version_before_reads_a_task_with_a_tag() -> None:
    fields = [one for one in msgspec.structs.fields(leg_wire.Task) if one.name != "tag"]
    before = msgspec.defstruct(
        "Task",
        [
            (one.name, one.type)
            if one.required
            else (one.name, one.type, msgspec.field(default=None))
            for one in fields
        ],
    )
    task = leg_wire.Task(
        "req_" + "0" * 26, FAKE, [], SamplingDefaults(), 7, 20, [], "0" * 64, tag="0" * 32
    )
    read: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(task), type=before)
    assert read.request_id == task.request_id and not hasattr(read, "tag")
