"""The pages for admins, and the playground: a part of the table in `routes`."""

from __future__ import annotations

from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.pages import (
    admin_accounts,
    admin_audit,
    admin_engines,
    admin_keys,
    admin_models,
    admin_peers,
    admin_receipts,
    playground,
)

# fmt: off
ADMIN_PAGES: tuple[Endpoint, ...] = (
    Endpoint("GET", "/admin/engines", "page", admin_engines.engines),
    Endpoint("GET", "/admin/models", "page", admin_models.models),
    Endpoint("GET", "/admin/models/show", "page", admin_models.model),
    Endpoint("GET", "/admin/keys", "page", admin_keys.keys),
    Endpoint("GET", "/admin/accounts", "page", admin_accounts.accounts),
    Endpoint("GET", "/admin/peers", "page", admin_peers.peers),
    Endpoint("GET", "/admin/audit", "page", admin_audit.audit),
    Endpoint("GET", "/admin/receipts", "page", admin_receipts.list_receipts),
    Endpoint("GET", "/playground", "page", playground.playground),
)
# fmt: on
