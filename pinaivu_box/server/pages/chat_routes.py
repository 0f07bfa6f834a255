"""The pages of chats, and what their scripts ask for beside `/v1/conversations`."""

from __future__ import annotations

from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.pages import chat
from pinaivu_box.text import END


class ConversationPage(Endpoint):
    """Below /chat, but not /chat/completions: programs with a wrong base URL ask for that, and have
    to hear what is right."""

    def _pattern(self) -> str:
        return super()._pattern().replace("/chat/", f"/chat/(?!completions{END})")


# fmt: off
CHAT_PAGES: tuple[Endpoint, ...] = (
    Endpoint("GET", "/chat", "page", chat.chat),
    Endpoint("GET", "/memories", "page", chat.memories),
    ConversationPage("GET", "/chat/{conversation_id}", "page", chat.conversation),
    ConversationPage("GET", "/chat/{conversation_id}/messages", "account", chat.messages),
    ConversationPage("GET", "/chat/{conversation_id}/answers/{message_id}", "account",
                     chat.follow_answer),
)
# fmt: on
