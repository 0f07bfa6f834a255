"""What two boxes say about one leg of a request, on a stream of its own (purpose `work`).

    coordinator                             serving box
    LegRequest, or Count         ->
                                 <-         LegRefused, and that is all; or Tokens, to a Count,
                                            after Alive while it waits, if `patient`
                                 <-         LegStarted, PromptRead, Outputs ..., Alive while idle
    StopLeg, at any time         ->
                                 <-         LegProof, before the Outputs with the finish reason
    Accepted, or Disputed        ->

The serving box signs every Outputs with a mark: what has been sent is proven even if it dies before
its proof.  The coordinator signs the proof in turn, after it has compared it with what it saw: then
both hold the same account of the leg, signed by both.

LegRequest says which version of proofs the coordinator reads, and LegStarted which one it gets.  A
box that does not say so is of version 1: its proofs cover neither log-probabilities nor vectors.
Of version 3 is what a box says of a leg that it had from an upstream: its Outputs have text without
token ids, and its LegProof is a `receipt.UpstreamLeg`.

A message is 1 to 64 frames, each with a byte before it: 1 if more of it follows, 0 if not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from pinaivu_box.engine.messages import (
    Constraint,
    LogitBias,
    MinTokens,
    Output,
    Penalty,
    RepeatPenalty,
    Sampling,
    SamplingDefaults,
    SamplingParams,
    Seed,
    Tools,
    TypicalP,
)
from pinaivu_box.errors import ProtocolError
from pinaivu_box.receipts.receipt import Name
from pinaivu_box.text import DIGEST, NAME, NO_CONTROLS, REQUEST_ID, SIGNATURE, whole
from pinaivu_box.transport.link import Stream
from pinaivu_box.transport.rpc import send_frames
from pinaivu_box.transport.wire import MAX_FRAME_BYTES, decode, encode

PURPOSE = "work"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_PIECES = 64  # of a message
_PIECE = MAX_FRAME_BYTES - 1
MAX_TOKENS = 2**21  # of a prompt, or an answer
MAX_OUTPUTS = 1024  # in a message

MAX_MESSAGES = 16384  # of a conversation
MAX_CALLS = 256  # of a message

Token = Annotated[int, Meta(ge=0, lt=2**31)]
Tokens_ = Annotated[list[Token], Meta(max_length=MAX_TOKENS)]
Text = Annotated[str, Meta(max_length=MAX_MESSAGE_BYTES)]
Short = Annotated[str, Meta(max_length=256)]
Shown = Annotated[str, Meta(max_length=256, pattern=NO_CONTROLS)]
Hex32 = Annotated[str, Meta(pattern=DIGEST)]
Hex64 = Annotated[str, Meta(pattern=SIGNATURE)]
Traceparent = Annotated[str, Meta(pattern=whole("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"))]
Tag = Annotated[str, Meta(pattern=whole("[0-9a-f]{32}"))]
Price = Annotated[str, Meta(max_length=32)]
Version = Annotated[int, Meta(ge=1, lt=2**31)]
_Small = Annotated[int, Meta(ge=0, lt=2**31)]
# As `openai.request.normalise` makes them; all else would take the room of a thousand times more.
_Call = Annotated[dict[Short, Text | dict[Short, Text]], Meta(max_length=8)]
_Calls = Annotated[list[_Call], Meta(max_length=MAX_CALLS)]
_Message = Annotated[dict[Short, Text | _Calls | None], Meta(max_length=16)]


class Task(Struct, frozen=True, omit_defaults=True):
    """The fields of `gateway.backend.Job` that a peer needs; see there.  Those of its `sampling`
    are on the wire beside the others, and in `asked`.

    Tasks of one peer with the same `tag` may share cached prefixes, and others may not; those
    without one only share within their request.
    """

    request_id: Annotated[str, Meta(pattern=REQUEST_ID)]
    model: Annotated[str, Meta(min_length=1, max_length=128)]
    messages: Annotated[list[_Message], Meta(max_length=MAX_MESSAGES)]
    asked: SamplingDefaults
    seed: Seed
    max_tokens: Annotated[int, Meta(ge=0, lt=2**53)] | None  # as RFC 8785 can write it
    stop: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=64)]
    nonce: Hex32
    choice: _Small = 0
    prompt_number: _Small = 0
    leg: Annotated[int, Meta(ge=0, le=64)] = 0
    ignore_eos: bool = False
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repeat_penalty: RepeatPenalty = 1.0
    typical_p: TypicalP = 1.0
    min_tokens: MinTokens = 0
    logit_bias: LogitBias = {}
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    prompt: Text | Tokens_ | None = None
    tools: Tools | None = None
    template: Annotated[dict[Short, bool | int | float | Short], Meta(max_length=16)] = {}
    constraint: Constraint | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prediction: Text = ""
    cache: bool = True
    suffix: Text = ""
    echo: bool = False
    scored: _Small = 0
    unsaid: _Small = 0
    inputs: Annotated[list[Text | Tokens_], Meta(min_length=1, max_length=4096)] | None = None
    dimensions: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    read: Tokens_ | None = None
    thinking: bool = False
    settled: Sampling | None = None
    tag: Tag | None = None
    system: Text = ""

    @property
    def sampling(self) -> SamplingParams:
        beside = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        return SamplingParams(**msgspec.structs.asdict(self.asked), **beside)


# The fields of a task that are those of its `sampling`; the others of that are in `asked`.
SAMPLING_FIELDS = tuple(set(Task.__struct_fields__) & set(SamplingParams.__struct_fields__))


class LegRequest(Struct, frozen=True, tag="ask"):
    """Run it with the file of that `digest`, going on after the tokens `made`, at `prices` of 1,000
    tokens (prompt, cached, completion) or less.  Of several answers to one prompt the first
    `pays_prompt`.  `proof` is the highest version that the coordinator reads, `traceparent` (W3C
    Trace Context) the coordinator's span of the leg, if it tells."""

    task: Task
    digest: Hex32
    made: Tokens_
    prices: tuple[Price, Price, Price]
    currency: Annotated[str, Meta(max_length=16)]
    pays_prompt: bool = True
    proof: Version = 1
    # Unset here and below, so that frames of others stay as they were.
    traceparent: Traceparent | UnsetType = UNSET


class Count(Struct, frozen=True, tag="count"):
    """Its prompt's tokens are wanted, or the text of `tokens`; see `engine.messages.Tokenize`.  A
    `patient` coordinator reads Alive before the answer; one of an earlier version does not."""

    task: Task
    digest: Hex32
    tokens: Tokens_ | None = None
    plain: bool = False
    patient: bool | UnsetType = UNSET


class StopLeg(Struct, frozen=True, tag="stop"):
    """The client is gone: stop within a step, and prove what was made."""


class Accepted(Struct, frozen=True, tag="accepted"):
    """The coordinator's signature over the proof (domain `pinaivu/acceptance/v1`)."""

    signature: Hex64


class Disputed(Struct, frozen=True, tag="disputed"):
    """The proof is not about what was received; nothing is owed for it."""

    why: Annotated[str, Meta(max_length=500)]


ToServing = LegRequest | Count | StopLeg | Accepted | Disputed


class LegRefused(Struct, frozen=True, tag="refused"):
    """`code` as in `errors.ApiError`.  With `other` somebody else may well serve it."""

    code: Short
    message: Annotated[str, Meta(max_length=4000)]
    param: Short | None = None
    retry_after: _Small | None = None
    other: bool = False


class AskedUpstream(Struct, frozen=True):
    """The name of the upstream in the configuration there, and the model's name at it."""

    name: Annotated[str, Meta(max_length=256, pattern=NAME)]
    model: Shown


class LegStarted(Struct, frozen=True, tag="began"):
    """`nonce` is of the commitment to the output, `proof` the version of what will be signed.  With
    `upstream` the box does not compute the leg, but asks that: there are no token ids then.  With
    `exactness`, which is for coordinators that read it, what is signed is of
    `receipt.EXACT_VERSION`; "statistical" promises nothing but that."""

    digest: Hex32
    build: Shown
    device: Shown
    sampling: Sampling
    tool_style: Short
    thinks: bool
    nonce: Hex32
    proof: Version = 1
    upstream: AskedUpstream | UnsetType = UNSET
    exactness: Name | UnsetType = UNSET


class PromptRead(Struct, frozen=True, tag="read"):
    tokens: Tokens_
    thinking: bool = False
    text: Text = ""


class Out(Output, array_like=True, dict=True):
    """An Output within bounds."""

    text: Text
    tokens: Tokens_
    finish_reason: Short | None = None
    queue_ms: Annotated[float, Meta(ge=0, le=2**40)] | None = None
    cached_tokens: _Small | None = None
    shifted_tokens: _Small = 0


class Outputs(Struct, frozen=True, tag="outputs"):
    """`mark`: the serving box's signature over `receipt.mark_text` of all that it has sent."""

    outputs: Annotated[list[Out], Meta(max_length=MAX_OUTPUTS)]
    mark: Hex64


class Alive(Struct, frozen=True, tag="alive"):
    """The request waits, or a model is being loaded: there is nothing to say, and all is well."""


class LegProof(Struct, frozen=True, tag="proved"):
    """`signed` is the text of a `receipt.LegStatement`, and `signature` covers it."""

    signed: Annotated[str, Meta(max_length=100_000)]
    signature: Hex64


class Tokens(Struct, frozen=True, tag="tokens"):
    """The answer to Count; `context` is the model's there."""

    tokens: Tokens_
    text: Text = ""
    thinking: bool = False
    context: _Small = 0


ToCoordinator = LegRefused | LegStarted | PromptRead | Outputs | Alive | LegProof | Tokens

to_serving: msgspec.msgpack.Decoder[ToServing] = msgspec.msgpack.Decoder(ToServing)
to_coordinator: msgspec.msgpack.Decoder[ToCoordinator] = msgspec.msgpack.Decoder(ToCoordinator)
T = TypeVar("T")
Check = Callable[[bytes], Awaitable[None]]


async def send(stream: Stream, *messages: ToServing | ToCoordinator) -> int:
    """How many bytes were sent.  Raises LinkLost, also if the peer takes nothing; ValueError if one
    is longer than MAX_MESSAGE_BYTES."""
    frames = [frame for message in messages for frame in _frames(message)]
    size = sum(map(len, frames))
    for batch in [frames] if size <= _PIECE else [[frame] for frame in frames]:
        await send_frames(stream, *batch)
    return size


def _frames(message: ToServing | ToCoordinator) -> list[bytes]:
    body = encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes")
    return [
        bytes([at + _PIECE < len(body)]) + body[at : at + _PIECE]
        for at in range(0, len(body), _PIECE)
    ]


async def receive(
    stream: Stream,
    decoder: msgspec.msgpack.Decoder[T],
    seconds: float | None = None,
    check: Check | None = None,
) -> T | None:
    """The next message, None once the peer has finished; `seconds` are for each of its frames.
    `check` looks at it before it is decoded, and may raise ProtocolError (see `large_messages`).
    Raises LinkLost, ProtocolError, TimeoutError."""
    body = bytearray()
    for _ in range(MAX_PIECES):
        async with asyncio.timeout(seconds):
            frame = await stream.receive()
        if frame is None:
            break
        body += frame[1:]
        if frame[0] > 1 or len(body) > MAX_MESSAGE_BYTES:
            raise ProtocolError("a message of another kind, or longer than is allowed")
        if frame[0] == 0:
            whole = bytes(body)
            if check is not None:
                await check(whole)
            return decode(whole, decoder)
    if body:
        raise ProtocolError("a message without an end")
    return None
