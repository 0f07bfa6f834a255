"""Wire types of `/v1/conversations`: chats that the box keeps, sealed, for an account.

Times are Unix milliseconds.  A conversation is a tree of messages: each names its parent, and the
first has none.  Messages with the same parent are branches; `leaf` is the last message of the one
that is shown.

The stream of an answer has these events, as JSON: AnswerStarted once, AnswerDelta as often as
something was added, AnswerFinished once, whatever the end was.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from pinaivu_box.engine.messages import Seed, Temperature, TopP
from pinaivu_box.openai.types import Effort, Strict, TokenCount
from pinaivu_box.text import whole

MAX_TITLE = 200  # characters
MAX_SYSTEM = 32_000
MAX_TEXT = 2_000_000  # of one message, or of one file; of an answer with its thoughts
MAX_FILES = 20  # of one message; as many images
MAX_IMAGE = 14_000_000
MAX_IMPORTED_MESSAGES = 100_000  # of one import
MAX_IMPORTED_CONVERSATIONS = 10_000

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Title = Annotated[str, Meta(max_length=MAX_TITLE)]
ModelName = Annotated[str, Meta(max_length=512)]
SystemPrompt = Annotated[str, Meta(max_length=MAX_SYSTEM)]
LongText = Annotated[str, Meta(max_length=MAX_TEXT)]
ImageUrl = Annotated[str, Meta(pattern=whole("data:image/[!-~]*"), max_length=MAX_IMAGE)]
Time = Annotated[int, Meta(ge=0, le=2**53 - 1)]
# Of an answer.  `interrupted`: the box stopped in the middle of it.  `stopped`: by the user.
Status = Literal["running", "complete", "stopped", "failed", "interrupted"]
Role = Literal["user", "assistant"]


class TextFile(Strict, frozen=True):
    """A text file that is attached to a message."""

    name: Annotated[str, Meta(min_length=1, max_length=255)]
    text: LongText


class Conversation(Struct, frozen=True):
    """As lists show it.  `updated_at`: of its last message, or change."""

    id: str
    title: str
    model: str
    system: str
    memory: bool
    leaf: str | None
    created_at: int
    updated_at: int
    object: str = "conversation"


class ConversationList(Struct, frozen=True):
    """Newest first; `next` is the `after` of the next page, null on the last one.  `searched_all`
    is false if a search ended at its limit."""

    data: list[Conversation]
    next: str | None = None
    searched_all: bool = True
    object: str = "list"


class ListConversations(Strict, frozen=True):
    """Query.  With `search`: those that have all of its words, in their title or in a message."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    after: Annotated[str, Meta(max_length=100)] = ""
    search: Annotated[str, Meta(max_length=200)] = ""


class NewConversation(Strict, frozen=True):
    """Without a title, it gets one from the first message."""

    title: Title = ""
    model: ModelName = ""
    system: SystemPrompt = ""
    memory: bool = True


class ConversationChange(Strict, frozen=True):
    """What is left out stays; `leaf` selects the branch that is shown."""

    title: Title | UnsetType = UNSET
    model: ModelName | UnsetType = UNSET
    system: SystemPrompt | UnsetType = UNSET
    memory: bool | UnsetType = UNSET
    leaf: Id | UnsetType = UNSET


class Message(Struct, frozen=True, omit_defaults=True):
    """`content` is Markdown, as it was written; `reasoning` are a model's thoughts.  `images` are
    `data:` URLs.  From `status` on: of answers.  `memories` are the ids of those that were put
    before the model, `remembered` of those that the message before it has added."""

    id: str
    parent: str | None
    role: Role
    created_at: int
    content: str
    reasoning: str = ""
    files: list[TextFile] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    status: Status = "complete"
    error: str = ""
    model: str = ""
    request_id: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_second: float | None = None
    memories: list[str] = field(default_factory=list)
    remembered: list[str] = field(default_factory=list)


class MessageList(Struct, frozen=True):
    """All messages of a conversation, oldest first, those of all branches."""

    data: list[Message]
    leaf: str | None
    object: str = "list"


class AnswerRequest(Strict, frozen=True, kw_only=True):
    """With `content` (or files, or images): a new message of the user, and the answer to it.  It
    comes after `parent`, or after the leaf if that is left out; null begins another first branch.
    So to edit a message is to send another with the same parent.

    Without: another answer to the user's message `parent` (left out: to the last one).

    `model`: that of the conversation if it is left out; else it becomes that.
    """

    content: LongText = ""
    files: Annotated[list[TextFile], Meta(max_length=MAX_FILES)] = field(default_factory=list)
    images: Annotated[list[ImageUrl], Meta(max_length=MAX_FILES)] = field(default_factory=list)
    parent: Id | UnsetType | None = UNSET
    model: ModelName = ""
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    reasoning_effort: Effort | None = None


class FollowAnswer(Strict, frozen=True):
    """Query.  `offset`: of the last AnswerDelta that arrived; the stream goes on after it."""

    offset: Annotated[str, Meta(pattern=whole("[0-9]{1,9}[.][0-9]{1,9}"))] = "0.0"


class AnswerStarted(Struct, frozen=True, tag="started", tag_field="type"):
    """`message` is the user's new one, null if there is none.  The text of the answer comes in
    Deltas."""

    conversation: str
    message: Message | None
    answer: Message


class AnswerDelta(Struct, frozen=True, tag="delta", tag_field="type", omit_defaults=True):
    """What was added.  `offset` (how much there is of thoughts and text) is for FollowAnswer."""

    offset: str
    text: str = ""
    reasoning: str = ""


class AnswerFinished(Struct, frozen=True, tag="finished", tag_field="type"):
    """The answer as it is stored, with its status, tokens and receipt's id; and the title that the
    conversation has now."""

    answer: Message
    title: str


class Stopped(Struct, frozen=True):
    """Whether the answer was still running."""

    id: str
    stopped: bool


class Deleted(Struct, frozen=True):
    id: str
    deleted: bool = True


class ExportQuery(Strict, frozen=True):
    format: Literal["json", "markdown"] = "json"


class PortableMessage(Strict, frozen=True):
    """Ids have a meaning within the file only."""

    id: Id
    role: Role
    content: LongText
    parent: Id | None = None
    created_at: Time = 0
    reasoning: LongText = ""
    files: Annotated[list[TextFile], Meta(max_length=MAX_FILES)] = field(default_factory=list)
    images: Annotated[list[ImageUrl], Meta(max_length=MAX_FILES)] = field(default_factory=list)
    status: Status = "complete"
    error: Annotated[str, Meta(max_length=2000)] = ""
    model: ModelName = ""
    request_id: Annotated[str, Meta(max_length=64)] = ""
    finish_reason: Annotated[str, Meta(max_length=64)] = ""
    prompt_tokens: Annotated[int, Meta(ge=0, le=2**31)] = 0
    completion_tokens: Annotated[int, Meta(ge=0, le=2**31)] = 0
    tokens_per_second: Annotated[float, Meta(ge=0, le=1e9)] | None = None


class PortableConversation(Strict, frozen=True):
    title: Title
    messages: Annotated[list[PortableMessage], Meta(max_length=MAX_IMPORTED_MESSAGES)]
    model: ModelName = ""
    system: SystemPrompt = ""
    memory: bool = True
    leaf: Id | None = None
    created_at: Time = 0
    updated_at: Time = 0


class PortableMemory(Strict, frozen=True):
    text: Annotated[str, Meta(min_length=1, max_length=500)]
    created_at: Time = 0


class Portable(Strict, frozen=True):
    """What an export in JSON has, and an import takes."""

    format: Literal["pinaivu-chats"]
    version: Literal[1]
    conversations: Annotated[
        list[PortableConversation], Meta(max_length=MAX_IMPORTED_CONVERSATIONS)
    ]
    memories: Annotated[list[PortableMemory], Meta(max_length=1_000)] = field(default_factory=list)


class Imported(Struct, frozen=True):
    """How many were added; memories that there were already are not counted."""

    conversations: int
    messages: int
    memories: int
