"""Pages: Jinja templates with the headers that keep scripts and frames of others out."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box import __version__
from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.charts import share
from pinaivu_box.server.pages.filters import FILTERS
from pinaivu_box.server.pages.shown import FUNCTIONS
from pinaivu_box.server.paths import forwarded_prefix
from pinaivu_box.server.sessions import session_of
from pinaivu_box.text import END

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent.parent
STATIC = FOLDER / "static"
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
THEME_COOKIE = "pinaivu_theme"  # static/start.js sets it
_LINK = re.compile(rf"https?://[^\s<>\"]+{END}")
_MAIL = re.compile(rf"[^\s<>\"@:/?&]+@[^\s<>\"@:/?&]+{END}")


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # many boxes show no page

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.globals.update(FUNCTIONS, share=share)
    return environment


@cache
def version_of(name: str) -> str:
    """Of a file below `static/`: part of its address, so that browsers may keep it for ever."""
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]


def page(request: Request, template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
    """A page.  In every template there are `prefix` (of a proxy, to put before paths), `static`
    (the address of a file below `static/`), `path` (of the request, without the prefix), `theme`
    ("" is the system's), `box_name`, `node_id`, `contact`, `contact_link`, `currency` and
    `version`; of the session `account`, None without one, `is_admin` and `csrf`, which changes
    need."""
    box, prefix = box_of(request), forwarded_prefix(request.headers)
    session = session_of(request)

    def static(name: str) -> str:
        return f"{prefix}/static/{name}?v={version_of(name)}"

    text = (
        _environment()
        .get_template(template)
        .render(
            prefix=prefix,
            static=static,
            box_name=box.config.peering.name or request.url.hostname or "",
            node_id=box.identity.node_id,
            contact=box.config.server.contact,
            contact_link=link_to(box.config.server.contact),
            currency=box.config.pricing.currency,
            path=request.url.path,
            theme=_theme(request),
            version=__version__,
            account=session and session.account,
            is_admin=session is not None and session.is_admin,
            csrf=session.session.csrf if session else "",
            **context,
        )
    )
    return HTMLResponse(text, status, HEADERS)


def link_to(contact: str) -> str:
    """Where a contact leads that is a web or a mail address; "" for other text."""
    if _LINK.match(contact):
        return contact
    return f"mailto:{contact}" if _MAIL.match(contact) else ""


def _theme(request: Request) -> str:
    chosen = request.cookies.get(THEME_COOKIE, "")
    return chosen if chosen in ("light", "dark") else ""
