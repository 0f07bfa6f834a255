"""Wire types of Ollama's API, and its requests as those of a chat.

Source: Ollama's `docs/api.md`.  What its requests say is what OpenAI's say in other words, so each
becomes a `ChatRequest`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from pinaivu_box.engine.messages import (
    MinP,
    Penalty,
    RepeatPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    TypicalP,
)
from pinaivu_box.errors import InvalidBody, UnsupportedParameter
from pinaivu_box.openai.fields import IgnoredFields
from pinaivu_box.openai.images import data_url
from pinaivu_box.openai.types import (
    MAX_TOOLS,
    AssistantMessage,
    CalledFunction,
    ChatRequest,
    ContentWithImages,
    CustomTool,
    Effort,
    ImagePart,
    JsonFormat,
    KeepAlive,
    Message,
    ModelRequest,
    NamedSchema,
    SchemaFormat,
    StopStrings,
    Strict,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)

_SCHEMA_NAME = "answer"
_MAX_TOKENS = 2**31 - 1
_MAX_INPUTS = 2048


def without_unknown_limits(raw: dict[str, Any], ignored: IgnoredFields) -> None:
    """Convert values that mean "no limit" or "nothing", as `parameters` does for others."""
    options = raw.get("options")
    if isinstance(options, dict):
        limit = options.get("num_predict")
        if isinstance(limit, int) and not isinstance(limit, bool):
            if limit < 0:  # until the model ends, or the context is full
                del options["num_predict"]
            else:
                options["num_predict"] = min(max(limit, 1), _MAX_TOKENS)
        if options.get("top_p") == 0:
            options["top_p"] = 1e-9
        if options.get("stop") in ("", []):
            del options["stop"]
    for message in raw.get("messages") or ():
        if isinstance(message, dict):
            for call in message.get("tool_calls") or ():
                if isinstance(call, dict):
                    call.setdefault("id", "")


class Options(Strict, frozen=True):
    """Parameters of a request; `num_predict` is the most tokens of the answer."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    typical_p: TypicalP | None = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    num_predict: Annotated[int, Meta(ge=1, le=_MAX_TOKENS)] | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class OllamaFunction(Strict, frozen=True):
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class OllamaCall(Strict, frozen=True):
    function: OllamaFunction
    id: str = ""


class OllamaMessage(Strict, frozen=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[str] | None = None


Format = Literal["", "json"] | dict[str, Any]
Think = bool | Effort


class _OllamaRequest(ModelRequest, frozen=True, kw_only=True):
    stream: bool | None = None  # Ollama streams unless told otherwise
    format: Format | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None
    think: Think | None = None
    prepare = staticmethod(without_unknown_limits)

    def chat(
        self, messages: list[Message], tools: list[Tool | CustomTool] | None = None
    ) -> ChatRequest:
        """The request as one of OpenAI's."""
        options = msgspec.structs.asdict(self.options or Options())
        max_tokens = options.pop("num_predict")
        schema = self.format
        think = self.think
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_tokens=max_tokens,
            tools=tools,
            response_format=(
                SchemaFormat(NamedSchema(_SCHEMA_NAME, schema))
                if isinstance(schema, dict) and schema
                else JsonFormat()
                if schema == "json"
                else None
            ),
            reasoning_effort=think if isinstance(think, str) else None,
            chat_template_kwargs={"enable_thinking": think} if isinstance(think, bool) else None,
            **options,
        )


class OllamaChatRequest(_OllamaRequest, frozen=True, kw_only=True):
    """Body of `POST /api/chat`."""

    messages: list[OllamaMessage] = field(default_factory=list)
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None

    def as_chat(self) -> ChatRequest:
        """Raises InvalidBody, UnsupportedParameter."""
        names: dict[str, str] = {}  # of calls, by the name of their function
        messages = [
            _message(number, message, names) for number, message in enumerate(self.messages)
        ]
        return self.chat(messages, None if self.tools is None else [*self.tools])


class GenerateRequest(_OllamaRequest, frozen=True, kw_only=True):
    """Body of `POST /api/generate`.  With `raw`, or a `suffix`, the prompt is read as it is; else
    it is the message of a user.  `images` are base64."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    raw: bool | None = None
    images: list[str] | None = None

    def as_chat(self) -> ChatRequest:
        """Raises UnsupportedParameter."""
        if self.images and (self.raw or self.suffix):
            raise UnsupportedParameter(
                "images belong to a chat: leave out raw and suffix",
                loc=("body", "images"),
                kind="value_error.unsupported",
            )
        system: list[Message] = [SystemMessage(content=self.system)] if self.system else []
        return self.chat([*system, UserMessage(content=_content(self.prompt, self.images))])


class EmbedRequest(ModelRequest, frozen=True, kw_only=True):
    """Body of `POST /api/embed`."""

    input: str | Annotated[list[str], Meta(min_length=1, max_length=_MAX_INPUTS)]
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    keep_alive: KeepAlive | None = None


class EmbeddingsRequest(ModelRequest, frozen=True, kw_only=True):
    """Body of `POST /api/embeddings`, which Ollama keeps for old clients."""

    prompt: str
    keep_alive: KeepAlive | None = None


class ShowRequest(Struct, frozen=True, kw_only=True):
    """Body of `POST /api/show`; `name` is an older spelling of `model`."""

    model: str = ""
    name: str = ""
    verbose: bool | None = None
    stream: bool | None = None  # this and the next have no effect
    options: dict[str, Any] | None = None


def _message(number: int, message: OllamaMessage, names: dict[str, str]) -> Message:
    """Raises InvalidBody, UnsupportedParameter."""
    content = _content(message.content, message.images)
    match message.role:
        case "system" | "assistant" if message.images:
            raise UnsupportedParameter(
                f"images may not be in a message of the {message.role}",
                loc=("body", "messages", number, "images"),
                kind="value_error.unsupported",
            )
        case "system":
            return SystemMessage(content=message.content)
        case "user":
            return UserMessage(content=content)
        case "tool":
            call_id = message.tool_call_id or names.get(message.tool_name or "")
            if call_id is None and names:  # old clients name nothing: it answers the last call
                call_id = list(names.values())[-1]
            if call_id is None:
                raise InvalidBody(
                    "no call comes before this result", loc=("body", "messages", number)
                )
            return ToolMessage(content=content, tool_call_id=call_id)
    calls = [
        _call(call, f"call_{number}_{position}")
        for position, call in enumerate(message.tool_calls or ())
    ]
    names.update({call.function.name: call.id for call in calls})
    return AssistantMessage(
        content=message.content, tool_calls=[*calls] or None, reasoning_content=message.thinking
    )


def _call(call: OllamaCall, call_id: str) -> ToolCall:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    return ToolCall(call.id or call_id, CalledFunction(call.function.name, arguments))


def _content(text: str, images: list[str] | None) -> ContentWithImages:
    """With the images before the text, as Ollama has them."""
    if not images:
        return text
    return [*(ImagePart(data_url(image)) for image in images), TextPart(text)]


# -- answers -------------------------------------------------------------------------------------


class AnsweredFunction(Struct, frozen=True):
    """`arguments` is the JSON of an object."""

    name: str
    arguments: msgspec.Raw | dict[str, Any]


class AnsweredCall(Struct, frozen=True):
    id: str
    function: AnsweredFunction


class AnsweredMessage(Struct, frozen=True):
    role: str
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class OllamaAnswer(Struct, frozen=True, kw_only=True):
    """A line of a streamed answer, or a whole one: `message` in a chat, `response` otherwise.  With
    the last come counts of tokens and durations in nanoseconds: of all, in the engine's queue, of
    the prompt (and of loading the model, the first time), and of the answer."""

    model: str
    created_at: str
    message: AnsweredMessage | UnsetType = UNSET
    response: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    done: bool = False
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class EmbedAnswer(Struct, frozen=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    request_id: str


class EmbeddingsAnswer(Struct, frozen=True):
    embedding: list[float]
    request_id: str


class ModelDetails(Struct, frozen=True):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class TaggedModel(Struct, frozen=True):
    """`size` in bytes; `digest` is the SHA-256 of the file, where it is known."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails


class Tags(Struct, frozen=True):
    models: list[TaggedModel]
    request_id: str = ""


class LoadedModel(Struct, frozen=True):
    """`size_vram` is what of it is on a GPU."""

    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str
    size_vram: int
    context_length: int


class LoadedModels(Struct, frozen=True):
    models: list[LoadedModel]
    request_id: str = ""


class ShownModel(Struct, frozen=True):
    """`parameters` has a line for each, `license` and `system` are what the publisher says."""

    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str
    license: str | UnsetType = UNSET
    system: str | UnsetType = UNSET
    parameters: str | UnsetType = UNSET
    request_id: str = ""


class OllamaVersion(Struct, frozen=True):
    """The version of Ollama whose API this is; clients compare it."""

    version: str
    request_id: str = ""
