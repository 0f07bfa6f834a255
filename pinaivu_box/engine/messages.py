"""The frames on the pipe between the box and an engine child: msgpack with a length.

A frame is a 4-byte little-endian length and a msgpack body: one `ToEngine` or `FromEngine`
struct.  This is the only module of `engine` that the parent may import.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from msgspec import Meta, Struct

from pinaivu_box.text import TOKEN_ID

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<I")


Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0, lt=1)]
TypicalP = Annotated[float, Meta(gt=0, le=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=10)]
LogitBias = Annotated[
    dict[Annotated[str, Meta(pattern=TOKEN_ID)], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=300),
]
MinTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class SamplingDefaults(Struct, frozen=True):
    """What a model's file or a box uses where a request sets no value; None where it has none.

    `temperature` 0 is greedy.  `top_k` 0, `top_p` 1 and `min_p` 0 switch that truncation off.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None


class SamplingParams(SamplingDefaults, frozen=True):
    """How the tokens of a request are drawn.  Of the first four, None leaves the value to the
    configuration, the model's file or llama.cpp's default (see `Sampling`).

    `typical_p` 1 switches that truncation off.  With `ignore_eos` end tokens are never drawn, and
    none among the first `min_tokens`, in which no stop string ends the output either.
    `frequency_penalty` and `presence_penalty` are OpenAI's, over the tokens of the output;
    `repeat_penalty` is llama.cpp's, over the last 64 tokens, the prompt's included.  `logit_bias`
    adds to the logits of token ids, which are text because JSON's keys are.
    """

    seed: Seed = 0
    ignore_eos: bool = False
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    typical_p: TypicalP = 1.0
    repeat_penalty: RepeatPenalty = 1.0
    min_tokens: MinTokens = 0

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repeat_penalty != 1)


class Sampling(SamplingParams, frozen=True):
    """The same with every value known, as an engine draws; recorded in the proof, so that the draw
    can be repeated.  The defaults are llama.cpp's."""

    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    top_k: TopK = 40
    min_p: MinP = 0.05

    def follows(self, params: SamplingParams) -> bool:
        """Whether every value that `params` sets is used."""
        values = msgspec.structs.asdict(params).items()
        return all(value is None or getattr(self, name) == value for name, value in values)


class Constraint(Struct, frozen=True):
    """What the output must be: a JSON schema, a regular expression, a Lark grammar as llguidance
    reads it, or llama.cpp's GBNF."""

    kind: Literal["json_schema", "regex", "lark", "gbnf"]
    text: str


class Tools(Struct, frozen=True):
    """The functions that are described to the model: JSON text of a list of OpenAI's `function`
    objects (frames do not carry every number that a schema may have), and the names of those that
    it may call.

    `choice` is "auto", "required", or the name of the function that is called, once; with
    `parallel`, "auto" and "required" allow several calls.
    """

    functions: str
    names: list[str]
    choice: str = "auto"
    parallel: bool = True


# -- devices and memory ------------------------------------------------------------------------

KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Split = Literal["layer", "tensor", "none"]
Exact = bool | Literal["auto"]
DeviceKind = Literal["cpu", "gpu", "igpu", "accel"]
CPU = "CPU"  # the device that every machine has


class ListedDevice(Struct, frozen=True):
    """What ggml can compute on, by its name there ("CPU", "CUDA0", "Vulkan0"); memory in bytes.

    `description` is the maker's name of it, `pci_id` its address as in "0000:c1:00.0", empty where
    there is none.  An integrated GPU ("igpu") and an accelerator ("accel") use the machine's
    memory.
    """

    name: str
    description: str
    kind: DeviceKind
    pci_id: str = ""
    total: int = 0
    free: int = 0


class GgmlBackend(Struct, frozen=True):
    """A library of ggml for other devices than the CPU, by its name ("cuda", "vulkan"), and how
    many devices it has.  `problem` is why it could not be loaded, `missing` the library that was
    not found, if that is why; `stand_ins` are libraries that only look like those that it needs."""

    name: str
    devices: int = 0
    problem: str = ""
    missing: str = ""
    stand_ins: list[str] = []


class DeviceMemory(Struct, frozen=True):
    """The bytes that an engine takes on a device: of the model's weights, of the KV cache (and of
    recurrent states), and of the buffers for computing."""

    device: str
    weights: int = 0
    cache: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute


class OutOfMemory(Struct, frozen=True):
    """A buffer that could not be allocated: its device and its bytes (0 if not known), and what was
    to be stored there."""

    device: str = ""
    wanted: int = 0
    purpose: Literal["weights", "cache", "compute", ""] = ""


# -- parent to child ---------------------------------------------------------------------------


class Adapter(Struct, frozen=True):
    """A LoRA adapter's file, and by what its weights are multiplied before they are added."""

    path: str
    scale: float = 1.0


class DraftFiles(Struct, frozen=True):
    """The files of a draft model; see LoadModel."""

    path: str
    offset: int = 0
    parts: list[str] = []
    model: str = ""
    adapters: list[Adapter] = []


class SavedPrefixes(Struct, frozen=True):
    """Where computed prefixes are kept while an engine is not loaded: the secret `key` is of the
    box and the model; all files in the folder have `max_bytes` at most.  See
    `engine.prefix_store`."""

    folder: str
    key: bytes
    max_bytes: int


class LoadModel(Struct, frozen=True, tag=True):
    """The first frame: which file to load and how; `model` is its id.

    Sizes are in tokens, `offset` is that of the model within the file in bytes, and `threads` 0
    means all physical cores.  `drafting` allows prompt lookup.  With `parse_special` control tokens
    are also recognised in messages and in texts to embed.  For a model in several files, `parts`
    lists all of them; `path` is the first.  `template` (Jinja) is used in place of the file's.
    `projector` is the file with which it sees images, of that digest (SHA-256 in hex).

    `devices` are the names of those that get the model, in this order; if there is none, all GPUs
    do, and with "CPU" alone none does.  The last `gpu_layers` of the layers (the output counts as
    one) are on them, all if it is negative: split by layers in the proportions of `tensor_split`
    (or of free memory), or each layer's tensors by these ("tensor"), or with "none" all on
    `main_device` (the first).

    `adapters` are added to the model.  `draft` is a smaller model, which is loaded beside it, onto
    the same devices, and proposes tokens.  `exact` is whether it has to give the same bits
    whatever else is computed, "auto" if it can (`engine.exactness`); `cpu_variant` is the variant
    of ggml's library for the CPU, the best if it is empty.
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
    parts: list[str] = []
    model: str = ""
    parse_special: bool = False
    template: str = ""
    devices: list[str] = []
    gpu_layers: int = -1
    split: Split = "layer"
    tensor_split: list[float] = []
    main_device: str = ""
    kv_type: KvType = "f16"
    projector: str = ""
    projector_digest: str = ""
    saved: SavedPrefixes | None = None
    adapters: list[Adapter] = []
    draft: DraftFiles | None = None
    exact: Exact = False
    cpu_variant: str = ""


class ListDevices(Struct, frozen=True, tag=True):
    """The first frame of a child that only answers with Devices."""


class Probe(Struct, frozen=True, tag=True):
    """The first frame of a child that answers with Probed (or LoadFailed) what the model would take
    if it were loaded so; it reads the header and allocates neither weights nor cache."""

    load: LoadModel


class Add(Struct, frozen=True, tag=True):
    """Start a sequence: `messages` for the model's template, or a raw `prompt` (text or tokens).

    * `read`: the prompt's tokens, if it was counted before; `thinking` says how they end (see
      Prompt).
    * `template`: more variables for the template.
    * `images`: the files of the images in the messages, by their SHA-256 in hex.  A message with
      images has a list of parts as its content: `{"type": "text", "text": ...}`, and for each image
      `{"type": "image", "sha256": ...}`.
    * `suffix`: the output is what stands between `prompt` and this text.
    * `output`: the tokens that earlier legs of this request have made.  The sequence goes on after
      them and sends only new tokens; `max_tokens` counts all.
    * `logprobs`: each token comes with its log-probability and that many of the likeliest ones.
    * `echo`: the prompt's text comes back and, with `logprobs`, the log-probabilities of its tokens
      before those of the output, except the first `scored` ones, which an earlier leg has sent.
    * `unsaid`: for so many of the last tokens of `output` the earlier leg has sent no
      log-probabilities, because it withheld their text.
    * `prediction`: text that the output may repeat, used for drafts.
    * `replay`: the whole output as it was recorded, which is computed again: the sequence goes on
      with these tokens whatever is drawn, and StepFrame tells of each (`engine.replay`).  It ends
      where it would have ended, or with the last of them.
    * `scope`: cached prefixes are shared with the sequences of the same scope, with none if it is
      empty.  Prefixes that `Named` has named are shared among all sequences with `named`.
    * `weight`: the tenant's share among tenants; `priority` orders the tenant's own sequences, the
      highest first.
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
    prompt: str | list[int] | None = None
    tools: Tools | None = None
    template: dict[str, Any] = {}
    constraint: Constraint | None = None
    logprobs: int | None = None
    prediction: str = ""
    scope: str = ""
    named: bool = False
    suffix: str = ""
    read: list[int] | None = None
    thinking: bool = False
    echo: bool = False
    scored: int = 0
    unsaid: int = 0
    images: dict[str, bytes] = {}
    replay: list[int] | None = None


class Cancel(Struct, frozen=True, tag=True):
    id: str


class Embed(Struct, frozen=True, tag=True):
    """Compute vectors of texts (or tokens), each cut to `dimensions` numbers if that is set.  The
    rest is as in Add."""

    id: str
    inputs: list[str | list[int]]
    dimensions: int | None = None
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0


class Tokenize(Struct, frozen=True, tag=True):
    """Return the tokens of the prompt, or of the inputs, of a request that is not run.

    With `plain` the prompt is a piece of text without special tokens; with `count` only the number
    of tokens is returned.  If `tokens` are set, return their text instead.
    """

    request: Add | Embed
    tokens: list[int] | None = None
    plain: bool = False
    count: bool = False


class Named(Struct, frozen=True, tag=True):
    """From now on, prompts that begin with one of these texts share that beginning with each other
    if they are `named`, whatever their scope.  The texts replace those of an earlier Named."""

    texts: list[str]


class SavePrefixes(Struct, frozen=True, tag=True):
    """Save the prefixes that were used last; the answer is PrefixesSaved.  The engine is about to
    be unloaded."""


ToEngine = LoadModel | ListDevices | Probe | Add | Cancel | Tokenize | Embed | Named | SavePrefixes

# -- child to parent ---------------------------------------------------------------------------


class Ready(Struct, frozen=True, tag=True):
    """The model is loaded.  `build` names the llama.cpp version, `device` what computes: those
    devices that have layers, by their makers' names.  `memory` says what it takes on each.
    `exactness` is as in `engine.exactness`, `cpu_variant` what computes on the CPU.  The model has
    `vocabulary` tokens, from 0 on.

    `tool_style` and `thinks` say how it writes (see `chat_format`).
    """

    build: str
    device: str
    context: int
    kv_tokens: int
    max_sequences: int
    defaults: SamplingDefaults
    tool_style: str = "tags"
    thinks: bool = False
    memory: list[DeviceMemory] = []
    exactness: str = ""
    cpu_variant: str = ""
    vocabulary: int = 0


class LoadFailed(Struct, frozen=True, tag=True):
    """Why the model is not loaded; `memory` is set if a device had too little."""

    message: str
    memory: OutOfMemory | None = None


class Devices(Struct, frozen=True, tag=True):
    """The answer to ListDevices."""

    devices: list[ListedDevice]
    backends: list[GgmlBackend] = []


class Probed(Struct, frozen=True, tag=True):
    """The answer to Probe: what it would take.  Weights and cache are llama.cpp's sums, not divided
    among devices; `compute` is by the device, "CPU" for the host's."""

    weights: int
    cache: int
    compute: dict[str, int]


class Tokenized(Struct, frozen=True, tag=True):
    """The answer to Tokenize; `thinking` is as in Prompt.  `count` is set if only the number was
    requested; then `tokens` is empty.  With the tokens of a plain text come the `ends`: the tokens
    that end an answer, and have no text."""

    id: str
    tokens: list[int]
    text: str = ""
    thinking: bool = False
    count: int | None = None
    ends: list[int] = []

    @property
    def number(self) -> int:
        """How many tokens there are."""
        return len(self.tokens) if self.count is None else self.count


class ReplayedToken(Struct, frozen=True, array_like=True):
    """A recorded token of an answer, and the one that was drawn in its place now; both with their
    logits as the model gave them (`logit` is the recorded one's).  If they differ, `margin` is how
    much the drawn one's score (logit over temperature, with penalties, biases and noise) is larger,
    and the recorded one is `possible` if it could have been drawn with other noise."""

    recorded: int
    drawn: int
    logit: float
    drawn_logit: float
    margin: float = 0.0
    possible: bool = True


class Prompt(Struct, frozen=True, array_like=True):
    """The prompt was rendered and tokenized; the sequence is waiting.  With `thinking` the prompt
    ends inside the model's thoughts, and so the output begins there.  `text` is the prompt's, if
    `echo` was set."""

    tokens: list[int]
    thinking: bool = False
    text: str = ""


class Refused(Struct, frozen=True):
    """The request cannot run here; `code` is that of a class in `pinaivu_box.errors`, `param` the
    field that is wrong."""

    id: str
    code: str
    message: str
    param: str | None = None


class TokenLogprob(Struct, frozen=True, array_like=True):
    """A token's bytes, its natural log-probability before any truncation or bias, and the same of
    the likeliest ones.  The first token of a prompt has none: 0, and no others."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]


class _Addressed:
    """What no frame holds; see Output."""

    choice: int = 0
    mark: str | None = None
    numbers: bytes | None = None
    replayed: Sequence[ReplayedToken] = ()


class Output(_Addressed, Struct, array_like=True, dict=True):
    """New text and tokens of a sequence; the last one has a finish reason.

    Frames of an engine and of a peer (see `legs.wire`) hold it as it is, and so it goes on to the
    client's stream.  `tokens` is every token drawn.  `text` may lag behind, and with it `logprobs`,
    which are those of the text's tokens; those of an echoed prompt come first.  `mark` (hex) is
    that of the frame in which a peer has sent it (see `receipt.mark_text`), and `choice`, which the
    runner sets, tells the choices of a request apart.  `numbers`, with its end, and `replayed` are
    from StepFrame.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None = None  # "stop", "length", "cancelled"
    queue_ms: float | None = None  # waited before its first step; on the first only
    cached_tokens: int | None = None  # of the prompt, found in the cache; on the first only
    shifted_tokens: int = 0  # dropped so far by context shifts
    logprobs: list[TokenLogprob] = []
    stop_string: str | None = None  # the one that has ended the sequence
    vectors: list[bytes] = []  # little-endian float32; all of an Embed's, with its end


class EngineLoad(Struct, frozen=True, array_like=True):
    """How busy the engine is, after a step.  `kv_used` (by running sequences) and `kv_cached` (left
    by finished ones, and free when needed) in tokens.  Of the drafted tokens some were accepted."""

    waiting: int = 0
    running: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    steps: int = 0
    tokens_computed: int = 0
    tokens_cached: int = 0
    preemptions: int = 0
    tokens_restored: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0


class StepFrame(Struct, frozen=True, tag=True):
    """All that has happened since the last frame; `prompts` and `outputs` are by the id of their
    sequence, and so are the `numbers` of sequences that have ended: the digests of what their
    tokens were drawn from (`engine.numbers_digest`); and `replayed` of those that are computed
    again."""

    prompts: dict[str, Prompt]
    refused: list[Refused]
    outputs: dict[str, Output]
    load: EngineLoad
    numbers: dict[str, bytes] = {}
    replayed: dict[str, list[ReplayedToken]] = {}


class PrefixesSaved(Struct, frozen=True, tag=True):
    """How many there are, their tokens, and their bytes."""

    prefixes: int = 0
    tokens: int = 0
    size: int = 0


FromEngine = PrefixesSaved | Ready | LoadFailed | Devices | Probed | StepFrame | Tokenized

NOTICE = "notice: "  # begins the lines that a child prints for the box's log

_encoder = msgspec.msgpack.Encoder()
# Of a frame's body.
decode_to_engine: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode


def encode(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


LENGTH_BYTES = _LENGTH.size


def body_length(header: bytes | bytearray) -> int:
    """The length of the frame that `header` begins.  Raises ValueError if it is too large."""
    (length,) = _LENGTH.unpack_from(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is larger than {MAX_FRAME_BYTES}")
    return int(length)


def read_body(stream: BinaryIO) -> bytes | None:
    """The next frame's body from a blocking stream; None at its end (also in mid-frame)."""
    header = stream.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    length = body_length(header)
    body = stream.read(length)
    return body if len(body) == length else None
