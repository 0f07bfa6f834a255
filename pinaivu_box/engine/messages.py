"""What crosses the pipe between the box and an engine child: msgpack frames with a length.

A frame is a 4-byte little-endian length and a msgpack body: one `ToEngine` or `FromEngine`
struct.  This is the only module of `engine` that the parent may import.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<I")


class Sampling(Struct, frozen=True):
    """How tokens are drawn; recorded in the proof, so that the draw can be repeated.

    `temperature` 0 is greedy.  `top_k` 0, `top_p` 1 and `min_p` 0 switch that truncation off.
    `seed` is a 64-bit signed integer.  With `ignore_eos` end tokens are never drawn.  The penalties
    are OpenAI's, over the tokens of the output; `logit_bias` adds to the logits of token ids, which
    are text because JSON's keys are.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] = {}

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the output so far."""
        return bool(self.frequency_penalty or self.presence_penalty)


class SamplingDefaults(Struct, frozen=True):
    """What a model's file or the configuration says; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


# -- parent to child ---------------------------------------------------------------------------


class Load(Struct, frozen=True, tag=True):
    """The first frame: which file to load and how.

    Sizes in tokens; `threads` 0 means all physical cores.  `drafting` allows prompt lookup.
    """

    path: str
    offset: int
    context: int
    kv_tokens: int
    max_sequences: int
    token_budget: int
    threads: int
    drafting: bool = True
    context_shift: bool = False


class Add(Struct, frozen=True, tag=True):
    """Start a sequence.

    `output` holds the tokens that another leg of this request has already made: the sequence
    goes on after them and sends only what comes next.  `max_tokens` counts them too.  `weight` is
    the tenant's share among tenants, `priority` orders the tenant's own (higher goes first).
    """

    id: str
    messages: list[dict[str, Any]]
    sampling: Sampling
    max_tokens: int | None
    stop: list[str]
    tenant: str
    output: list[int] = []
    weight: float = 1.0
    priority: int = 0


class Cancel(Struct, frozen=True, tag=True):
    id: str


ToEngine = Load | Add | Cancel

# -- child to parent ---------------------------------------------------------------------------


class Progress(Struct, frozen=True, tag=True):
    """The model is still loading; `fraction` is of its tensors."""

    fraction: float


class Ready(Struct, frozen=True, tag=True):
    """The model is loaded.  `build` names the llama.cpp version, `device` what computes."""

    build: str
    device: str
    context: int
    kv_tokens: int
    max_sequences: int
    defaults: SamplingDefaults


class LoadFailed(Struct, frozen=True, tag=True):
    message: str


class Admitted(Struct, frozen=True):
    """The prompt was rendered and tokenized; the sequence is waiting."""

    id: str
    prompt_tokens: list[int]


class Refused(Struct, frozen=True):
    """The request cannot run here; `code` is that of a class in `pinaivu_box.errors`."""

    id: str
    code: str
    message: str


class Delta(Struct, frozen=True, omit_defaults=True):
    """What one step gave one sequence.  `tokens` is every token drawn; `text` may lag behind."""

    id: str
    text: str = ""
    tokens: list[int] = []
    finish_reason: str | None = None  # "stop", "length", "cancelled"
    queue_ms: float | None = None  # waited before its first step; on the first delta only
    cached_tokens: int | None = None  # of the prompt, found in the cache; on the first delta only
    shifted_tokens: int = 0  # forgotten so far by context shifts


class EngineLoad(Struct, frozen=True):
    """How busy the engine is, after a step.  `kv_used` (by running sequences) and `kv_cached` (left
    by finished ones, had for the asking) in tokens."""

    waiting: int = 0
    running: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    steps: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    preemptions: int = 0


class StepFrame(Struct, frozen=True, tag=True):
    """Everything that one step, and the arrivals before it, have to say."""

    admitted: list[Admitted]
    refused: list[Refused]
    deltas: list[Delta]
    load: EngineLoad


FromEngine = Progress | Ready | LoadFailed | StepFrame

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes) -> ToEngine:
    message: ToEngine = _to_engine.decode(body)
    return message


def decode_from_engine(body: bytes) -> FromEngine:
    message: FromEngine = _from_engine.decode(body)
    return message


LENGTH_BYTES = _LENGTH.size


def body_length(header: bytes) -> int:
    """Length of the frame that `header` announces; ValueError if no honest side sends that."""
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is larger than {MAX_FRAME_BYTES}")
    return int(length)


def read_body(stream: BinaryIO) -> bytes | None:
    """Next frame's body from a blocking stream, None at its end (also in mid-frame)."""
    header = stream.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    length = body_length(header)
    body = stream.read(length)
    return body if len(body) == length else None
