"""A box with something of everything that pages show, in words that a page must not take for HTML.

Nothing in it is random, but for ids and times.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from tests.support.fake_model import FAKE
from tests.support.pages import PASSWORD, logged_in, make_account, make_owner
from tests.support.process_box import Box, StartBox, wait_until

Visitor = Literal["visitor", "member", "admin"]
SCRIPTED = "scripted:1"
# Each would be noticed: as a dialog, as a violation of the CSP, or as a request to another host.
MARKUP = '<img src=x onerror="alert(1)"><script>alert(2)</script>\'"--><b>bold'
BIDI = "invoice \u202egnp.exe\u202c \u2066\u202dabc"
RIGHT_TO_LEFT = "חשבונית 42 (abc)"
LONG = "W" * 190
ANSWER = f"""# Heading {MARKUP}

[one](javascript:alert(3)) [two](data:text/html,<script>alert(4)</script>)
[three](JaVaScRiPt:alert(5)) [four](https://elsewhere.example/) ![five](https://elsewhere.example/x.png)

> {BIDI}

```html
{MARKUP}
```

```python
def area(radius: float) -> float:
    return 3.14159 * radius**2  # {"long " * 40}
```

| a | b |
| - | - |
| {MARKUP} | {LONG} |

<svg onload=alert(6)></svg> <a href="javascript:alert(7)">x</a> <style>main{{display:none}}</style>
"""
CONFIG = """
[server]
contact = "admin@box.example"
[login]
signup = "open"
[pricing]
currency = "EUR"
per_1k_tokens = "0.25"
"""


@dataclass
class SeededBox:
    """`ids` are those in the paths of pages; `cookies` are the sessions of who looks at them."""

    box: Box
    ids: dict[str, str] = field(default_factory=dict)
    cookies: dict[Visitor, dict[str, str]] = field(default_factory=dict)


def seeded_box(start: StartBox, folder: Path) -> SeededBox:
    script = folder / "script.json"
    script.write_text(json.dumps([{"when": [], "say": ANSWER}]))
    models = ("--model", f"{FAKE}=fake:1", "--model", f"{SCRIPTED}=fake:{script}")
    box = start(*models, config=CONFIG)
    made = SeededBox(box)
    _send_requests(made)
    # They run a loop of their own, which the one of a browser's driver would not let them.
    with ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(make_owner, box.home).result()
        other_thread.submit(make_account, box.home, "ada").result()
    with logged_in(box.url, "owner", PASSWORD) as admin:
        made.cookies["admin"] = dict(admin.cookies)
        _make_keys(admin)
        link = admin.post("/v1/admin/accounts/ada/link").json()["url"]
        made.ids["token"] = link.rpartition("/")[2]
    with logged_in(box.url, "ada", PASSWORD) as member:
        made.cookies["member"] = dict(member.cookies)
        made.ids["conversation_id"] = _chat(member)
    return made


def _send_requests(made: SeededBox) -> None:
    box = made.box
    for count in (3, 20, 60):
        answer = box.chat(MARKUP, model=FAKE, max_tokens=count, user=MARKUP)
        made.ids["request_id"] = answer.json()["request_id"]
    assert box.chat(model="missing:1").status_code == 404
    receipt = f"/v1/receipts/{made.ids['request_id']}"
    wait_until(lambda: box.http("GET", receipt).status_code == 200, "the receipt")


def _make_keys(admin: httpx.Client) -> None:
    for name in (MARKUP, RIGHT_TO_LEFT, LONG):
        body = {"name": name, "account": "ada", "policy": {"rpm": 60, "budget": {"amount": "5"}}}
        answer = admin.post("/v1/admin/keys", json=body)
        assert answer.status_code == 200, answer.text


def _chat(member: httpx.Client) -> str:
    """A conversation with one answer; its id."""
    created = member.post("/v1/conversations", json={"model": SCRIPTED, "title": MARKUP + BIDI})
    assert created.status_code == 200, created.text
    conversation = str(created.json()["id"])
    for text in (MARKUP, LONG):
        memory = member.post("/v1/memories", json={"text": text})
        assert memory.status_code == 200, memory.text
    path = f"/v1/conversations/{conversation}/answers"
    with member.stream("POST", path, json={"content": MARKUP + BIDI}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.read()  # to its end
    return conversation
