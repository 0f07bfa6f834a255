"""The table of pages, as `server/endpoints` is that of endpoints.

Pages are rendered on the server.  Whatever they change, they change through endpoints, from
`static/`: a page can do nothing that an endpoint would refuse.
"""

from __future__ import annotations

from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.pages import (
    account,
    dashboard,
    explorer,
    login,
    own,
    root,
    sign_on,
    static,
)
from pinaivu_box.server.pages.admin_routes import ADMIN_PAGES
from pinaivu_box.server.pages.chat_routes import CHAT_PAGES

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
    Endpoint("GET", "/account", "page", account.account),
    Endpoint("GET", "/static/{name:path}", "public", static.static_file),
    *ADMIN_PAGES,
    *CHAT_PAGES,
)
# fmt: on
