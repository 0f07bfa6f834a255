"""The table of pages, as `server/endpoints` is that of endpoints.

Pages are rendered on the server.  Whatever they change, they change through endpoints, from
`static/`: a page can do nothing that an endpoint would refuse.
"""

from __future__ import annotations

from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.pages import (
    admin,
    admin_audit,
    chat,
    dashboard,
    explorer,
    login,
    own,
    root,
    sign_on,
    static,
)
from pinaivu_box.text import END


class ConversationPage(Endpoint):
    """Below /chat, but not /chat/completions: programs with a wrong base URL ask for that, and have
    to hear what is right."""

    def _pattern(self) -> str:
        return super()._pattern().replace("/chat/", f"/chat/(?!completions{END})")


# fmt: off
PAGES: tuple[Endpoint, ...] = (
    Endpoint("GET", "/", "page", root.index),
    Endpoint("GET", "/openapi.json", "public", root.openapi_document),
    Endpoint("GET", "/docs", "page", root.docs),
    Endpoint("GET", "/login", "page", login.login),
    Endpoint("GET", "/login/oidc", "page", sign_on.begin),
    Endpoint("GET", "/login/oidc/callback", "page", sign_on.callback),
    Endpoint("GET", "/login/link/{token}", "page", login.link),
    Endpoint("GET", "/logout", "page", login.logout),
    Endpoint("GET", "/explorer", "page", explorer.search),
    Endpoint("GET", "/explorer/network", "page", explorer.network),
    Endpoint("GET", "/explorer/r/{request_id}", "page", explorer.receipt),
    Endpoint("GET", "/explorer/r/{request_id}/receipt.json", "page", explorer.receipt_file),
    Endpoint("GET", "/dashboard", "page", dashboard.dashboard),
    Endpoint("GET", "/dashboard/figures", "page", dashboard.figures),
    Endpoint("GET", "/usage", "page", own.usage),
    Endpoint("GET", "/keys", "page", own.keys),
    Endpoint("GET", "/receipts", "page", own.receipts),
    Endpoint("GET", "/signup", "page", login.signup),
    Endpoint("GET", "/account", "page", own.account),
    Endpoint("GET", "/static/{name:path}", "public", static.static_file),
    Endpoint("GET", "/admin/engines", "page", admin.engines),
    Endpoint("GET", "/admin/models", "page", admin.models),
    Endpoint("GET", "/admin/models/show", "page", admin.model),
    Endpoint("GET", "/admin/keys", "page", admin.keys),
    Endpoint("GET", "/admin/accounts", "page", admin.accounts),
    Endpoint("GET", "/admin/peers", "page", admin.peers),
    Endpoint("GET", "/admin/audit", "page", admin_audit.audit),
    Endpoint("GET", "/admin/receipts", "page", admin.receipts),
    Endpoint("GET", "/playground", "page", own.playground),
    Endpoint("GET", "/chat", "page", chat.chat),
    Endpoint("GET", "/memories", "page", chat.memories),
    ConversationPage("GET", "/chat/{conversation_id}", "page", chat.conversation),
    ConversationPage("GET", "/chat/{conversation_id}/messages", "account", chat.messages),
    ConversationPage("GET", "/chat/{conversation_id}/answers/{message_id}", "account",
                     chat.follow_answer),
)
# fmt: on
