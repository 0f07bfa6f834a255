"""Messages of known types over a stream: limits, and the errors that say what a peer did."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import Struct, msgpack

from pinaivu_box.errors import LinkLost, PeeringError, ProtocolError
from pinaivu_box.transport import rpc, wire
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import MessageStream, RequestRejected, UnexpectedMessage
from tests.support.waiting import soon

pytestmark = pytest.mark.anyio
PEER = "node_" + "ab" * 32


class Question(Struct, tag=True):
    text: str


class Answer(Struct, tag=True):
    text: str


class Working(Struct, tag=True):
    pass


class Rejected(Struct, tag=True):
    message: str


Message = Question | Answer | Working | Rejected
DECODER: msgpack.Decoder[Message] = msgpack.Decoder(Message)


class ScriptedStream(Stream):
    """A stream whose peer sends what it is given; None is its end."""

    def __init__(self, *frames: Message | None, takes: bool = True) -> None:
        self.frames = list(frames)
        self.takes = takes
        self.sent: list[Message] = []
        self.finished = self.abandoned = self.left = False

    async def send(self, *frames: bytes) -> None:
        if not self.takes:
            await asyncio.Event().wait()
        self.sent += map(DECODER.decode, frames)

    async def receive(self) -> bytes | None:
        if not self.frames:
            await asyncio.Event().wait()
        message = self.frames.pop(0)
        return None if message is None else wire.encode(message)

    async def finish(self) -> None:
        self.finished = True

    def abandon(self) -> None:
        self.abandoned = True

    def leave(self) -> None:
        self.left = True

    async def _read_pipe(self) -> bytes:
        return b""


def messages(stream: ScriptedStream, **limits: float) -> MessageStream[Message, Message]:
    return MessageStream(
        PEER,
        stream,
        DECODER,
        receive_seconds=limits.get("receive_seconds", 60.0),
        max_messages=int(limits["max_messages"]) if "max_messages" in limits else None,
        rejection=Rejected,
        keepalive=Working,
    )


async def test_a_call_returns_the_response_after_any_keepalives() -> None:
    stream = ScriptedStream(Working(), Working(), Answer("42"))
    assert await messages(stream).call(Question("?"), Answer) == Answer("42")
    assert stream.sent == [Question("?")]


async def test_a_rejection_is_an_error_with_a_printable_sentence() -> None:
    stream = ScriptedStream(Rejected("no\x1b[2J\nmore"))
    with pytest.raises(RequestRejected) as refused:
        await messages(stream).call(Question("?"), Answer)
    assert refused.value.reason == "no [2J more" and refused.value.reason in refused.value.message


@pytest.mark.parametrize("frame", [Question("?"), None], ids=["type", "end"])
async def test_another_message_is_unexpected(frame: Message | None) -> None:
    with pytest.raises(UnexpectedMessage, match="instead of 'Answer'"):
        await messages(ScriptedStream(frame)).expect(Answer)


async def test_the_end_of_the_stream_is_none() -> None:
    assert await messages(ScriptedStream(None)).receive() is None


async def test_a_silent_peer_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        await messages(ScriptedStream(), receive_seconds=0.01).receive()
    with pytest.raises(TimeoutError):
        await messages(ScriptedStream()).receive(0.01)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SEND_SECONDS", 0.01)


async def test_a_peer_that_takes_nothing_is_lost(impatient: None) -> None:
    with pytest.raises(LinkLost, match="does not take"):
        await messages(ScriptedStream(takes=False)).send(Question("?"))


async def test_a_peer_may_send_so_many_messages() -> None:
    conversation = messages(ScriptedStream(*[Working()] * 3), max_messages=2)
    for _ in range(2):
        assert await conversation.receive() == Working()
    with pytest.raises(ProtocolError, match="over 2 messages"):
        await conversation.receive()


async def test_a_stream_is_finished_and_after_an_error_abandoned() -> None:
    stream = ScriptedStream()
    async with messages(stream):
        pass
    assert stream.finished and stream.left and not stream.abandoned
    stream = ScriptedStream()
    with pytest.raises(PeeringError):
        async with messages(stream):
            raise PeeringError("no")
    assert stream.abandoned and not stream.finished


async def test_a_waiting_peer_hears_that_work_goes_on() -> None:
    heard = asyncio.Event()

    async def work() -> str:
        await heard.wait()
        return "done"

    class Hearing(ScriptedStream):
        async def send(self, *frames: bytes) -> None:
            await super().send(*frames)
            if len(self.sent) == 3:
                heard.set()

    stream = Hearing()
    assert await messages(stream).wait_for(work(), Working(), 0.001) == "done"
    assert stream.sent[:3] == [Working()] * 3


async def test_work_for_a_peer_that_is_gone_is_cancelled(impatient: None) -> None:
    stream, cancelled = ScriptedStream(takes=False), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(LinkLost):
        await messages(stream).wait_for(work(), Working(), 0.001)
    await soon(cancelled.wait())


async def test_a_last_message_is_read_before_the_stream_ends() -> None:
    stream = ScriptedStream(Working(), None)
    await messages(stream).end_with(Rejected("no"))
    assert stream.sent == [Rejected("no")] and stream.finished
    assert stream.frames == []  # it was waited for the peer's end
