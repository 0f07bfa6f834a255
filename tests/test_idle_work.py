"""Facts about users, and titles, are looked for while there is nothing else to do, and only with
the key of a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given
from llguidance import LLMatcher

from pinaivu_box import idle_time
from pinaivu_box.chats import extraction, titles
from pinaivu_box.chats.conversations import Chats
from pinaivu_box.chats.memories import Memories
from pinaivu_box.chats.sealing import RowSealer, new_data_key
from pinaivu_box.home import database_of, prepare_home
from pinaivu_box.login.session_keys import SessionKeys
from pinaivu_box.server import own_requests
from pinaivu_box.server.idle_work import IdleWork, Spoken, Untitled
from pinaivu_box.store import accounts, pages_keys
from pinaivu_box.store.accounts import OWNER
from pinaivu_box.store.audit import Actor
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
TEXT = "I work as a gardener in Ghent, what should I plant?"
ANSWER = "I work as a gardener in Ghent"
QUESTION = "Which roses grow in the shade of a wall?"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Idle:
    """A box with one loaded model that answers once it is told to."""

    def __init__(self, database: Any, key_id: str) -> None:
        self.asked = self.stopped = 0
        self.may_answer = asyncio.Event()
        self.data_key = new_data_key()
        self.answered = ANSWER
        sealer = RowSealer(OWNER, self.data_key)
        self.memories, self.chats = Memories(database, sealer), Chats(database, sealer)
        self.requests = SimpleNamespace(count=0)
        box: Any = SimpleNamespace(
            database=database,
            requests=self.requests,
            session_keys=SessionKeys(),
            catalog=SimpleNamespace(get=lambda _: SimpleNamespace(id="m:1")),
            placement=SimpleNamespace(loaded={"m:1"}),
            admission=SimpleNamespace(draining=False),
        )
        self.session_keys = box.session_keys
        self.session_keys.put("sess_1", self.data_key)
        self.work = IdleWork(box)
        self.key_id = key_id
        self.spoken = Spoken(key_id, "sess_1", "m:1", TEXT)

    async def answer(self, *_: object, **__: object) -> str:
        self.asked += 1
        self.requests.count += 1
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        finally:
            self.requests.count -= 1
        return self.answered

    async def known(self) -> list[str]:
        return [memory.text for memory in await self.memories.ls()]

    async def done(self) -> None:
        assert self.work._task is not None
        await soon(self.work._task)

    async def untitled(self, title: str = "Which roses") -> str:
        """A conversation that is called so and may get another title; its id."""
        made = await self.chats.create(title, "m:1", "", memory=True)
        untitled = Untitled(self.key_id, "sess_1", "m:1", made.id, title, QUESTION)
        self.work.put(untitled)
        return made.id


@pytest.fixture
async def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Idle]:
    monkeypatch.setattr(idle_time, "_IDLE_SECONDS", 0.02)
    monkeypatch.setattr(idle_time, "_LOOK_SECONDS", 0.01)
    async with database_of(prepare_home(tmp_path)) as database:
        owner = await accounts.find(database, OWNER)
        key = await pages_keys.of(database, owner, Actor("test", "local"))
        made = Idle(database, key.id)
        monkeypatch.setattr(own_requests, "text", made.answer)
        yield made
        await made.work.close()


async def test_a_fact_is_added_once_nothing_else_runs(idle: Idle) -> None:
    idle.requests.count = 1
    idle.work.put(idle.spoken)
    await asyncio.sleep(0.1)
    assert idle.asked == 0
    idle.requests.count = 0
    idle.may_answer.set()
    await idle.done()
    assert await idle.known() == [ANSWER]


async def test_another_request_comes_first(idle: Idle) -> None:
    idle.work.put(idle.spoken)
    await wait_until(lambda: idle.asked == 1)
    idle.requests.count += 1
    await wait_until(lambda: idle.stopped == 1)
    assert await idle.known() == []
    idle.may_answer.set()
    idle.requests.count -= 1
    await idle.done()
    assert idle.asked == 2 and len(await idle.known()) == 1


async def test_without_the_key_of_a_session_nothing_is_looked_at(idle: Idle) -> None:
    idle.session_keys.drop("sess_1")
    idle.work.put(idle.spoken)
    await idle.done()
    assert idle.asked == 0


async def test_a_session_that_ends_meanwhile_adds_nothing(idle: Idle) -> None:
    idle.work.put(idle.spoken)
    await wait_until(lambda: idle.asked == 1)
    idle.session_keys.drop("sess_1")
    idle.may_answer.set()
    await idle.done()
    assert await idle.known() == []


async def test_memories_that_are_switched_off_are_not_looked_for(idle: Idle) -> None:
    await idle.memories.enable(enabled=False)
    idle.work.put(idle.spoken)
    await idle.done()
    assert idle.asked == 0


async def test_a_conversation_gets_a_title_of_the_model(idle: Idle) -> None:
    idle.answered = "  roses in the \u202eshade.\n"
    chat = await idle.untitled()
    before = await idle.chats.get(chat)
    idle.may_answer.set()
    await idle.done()
    after = await idle.chats.get(chat)
    assert after.title == "Roses in the shade" and after.updated_at == before.updated_at


async def test_a_title_of_the_user_stays(idle: Idle) -> None:
    idle.answered = "Roses in the shade"
    chat = await idle.untitled()
    await wait_until(lambda: idle.asked == 1)
    await idle.chats.change(chat, lambda one: msgspec.structs.replace(one, title="Mine"))
    idle.may_answer.set()
    await idle.done()
    assert (await idle.chats.get(chat)).title == "Mine"


async def test_a_conversation_that_is_deleted_meanwhile_gets_no_title(idle: Idle) -> None:
    chat = await idle.untitled()
    await wait_until(lambda: idle.asked == 1)
    await idle.chats.delete(chat)
    idle.may_answer.set()
    await idle.done()
    assert (await idle.chats.page("", 10)).data == []


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "x",
        ".....",
        "Title:",
        "Conversation",
        "Quantum chromodynamics",
        "Which " * 20,
        "roses" * 40,
    ],
)
async def test_what_is_no_title_is_passed_over(idle: Idle, answer: str) -> None:
    idle.answered = answer
    chat = await idle.untitled()
    idle.may_answer.set()
    await idle.done()
    assert (await idle.chats.get(chat)).title == "Which roses"


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ('Title: "Roses for a wall"', "Roses for a wall"),
        ("roses\tand shade", "Roses and shade"),
        ("Tulpen am Fenster", ""),
        ("Wall roses", "Wall roses"),
    ],
)
def test_a_title_is_plain_and_about_the_text(answer: str, title: str) -> None:
    assert titles.title_in(answer, QUESTION) == title


# -- what a user says of themselves ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        (TEXT, [ANSWER]),
        ("I'm Kim, and I teach physics. Explain entropy.", ["I'm Kim", "I teach physics"]),
        ("Ich habe zwei Katzen!", ["Ich habe zwei Katzen"]),
        ("My dog is called Rex; I prefer tea.", ["My dog is called Rex", "I prefer tea"]),
        ("How long does an egg have to boil?", []),
        ("Can you help me? I want to know how. I can't see it.", []),
        ("Please explain my contract to me.", []),
        ("I was in a hurry this morning. I just had lunch.", []),
        ("> I work as a gardener\n```\nI live in Ghent\n```", []),
        ("I like " + "very " * 60 + "long walks.", []),
        ("I like tea. " * 3_000, []),
    ],
)  # fmt: skip
def test_clauses_say_something_of_their_writer(text: str, clauses: list[str]) -> None:
    assert extraction.clauses(text) == clauses


def test_a_fact_is_what_the_user_has_written() -> None:
    text = "I'm Kim, and I teach physics in Oslo. I like tea. I play chess on Sundays."
    answer = "I like tea\nI am the king of Norway\nI like tea\nI'm Kim\nnone"
    assert extraction.facts_in(answer, text) == ["I like tea", "I'm Kim"]


@given(st.text(max_size=200).map(lambda text: f'I like {text}. My "\\{text}"\tcat is {text}.'))
def test_the_grammar_of_any_text_is_one(text: str) -> None:
    if extraction.clauses(text):
        grammar = LLMatcher.grammar_from_lark(extraction.constraint(text).text)
        assert LLMatcher.validate_grammar(grammar) == ""
