"""`/playground`: a request to a model, with all that comes back."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse

from pinaivu_box.server.context import box_of
from pinaivu_box.server.pages.render import page
from pinaivu_box.server.sessions import require_login


async def playground(request: Request) -> HTMLResponse:
    """Raises LoginNeeded."""
    session = require_login(request)
    admission, policy = box_of(request).admission, session.key.policy
    models = [model.id for model in admission.models(policy)]
    models += [alias for alias, _ in admission.aliases(policy)]
    return page(request, "playground.html", models=models)
