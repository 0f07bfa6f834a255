"""The pages for admins and the playground: who sees them, what is on them, and the endpoints that
they need."""

from __future__ import annotations

import csv
import html.parser
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.server.pages.admin_audit import lines_of
from tests.support.fake_model import FAKE, ask_fake_model
from tests.support.in_process_box import in_process_box
from tests.support.memory_transport import MemoryNetwork
from tests.support.pages import logged_in, make_account, make_owner, visitor
from tests.support.process_box import Box, StartBox

HOSTILE = "<script>alert(1)</script>&\"'\u202eevil"
ADMIN_PAGES = (
    "/admin/engines", "/admin/models", f"/admin/models/show?model={FAKE}", "/admin/keys",
    "/admin/accounts", "/admin/peers", "/admin/audit", "/admin/receipts",
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a page holds: its `text`, the `items` that its scripts read, its `tags` with their
    attributes."""

    def __init__(self, answer: httpx.Response | str) -> None:
        super().__init__()
        if not isinstance(answer, str):
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"].startswith("text/html")
        self.items: list[dict[str, Any]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(answer if isinstance(answer, str) else answer.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if item := attributes.get("data-item"):
            self.items.append(json.loads(item))

    def handle_data(self, data: str) -> None:
        self.text += data

    def links(self) -> set[str]:
        return {str(attributes.get("href")) for tag, attributes in self.tags if tag == "a"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    started = module_box("--model", f"{FAKE}=fake:1", config='[pricing]\nper_1k_tokens = "0.2"\n')
    make_owner(started.home)
    make_account(started.home, "ada")
    return started


@pytest.fixture(scope="module")
def admin(box: Box) -> Iterator[httpx.Client]:
    with logged_in(box.url, "owner") as client:
        yield client


@pytest.fixture(scope="module")
def key(admin: httpx.Client) -> dict[str, Any]:
    """A key with a hostile name, which has made a request."""
    body = {"name": HOSTILE.replace("\u202e", ""), "policy": {"rpm": 77, "models": [FAKE]}}
    made = sent(admin, "POST", "/v1/admin/keys", body)
    chat = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    headers = {"authorization": f"Bearer {made['key']}"}
    answer = admin.post("/v1/chat/completions", json=chat, headers=headers)
    assert answer.status_code == 200, answer.text
    return {**made, "request_id": answer.headers["x-request-id"]}


def sent(client: httpx.Client, method: str, path: str, body: Any = None) -> dict[str, Any]:
    answer = client.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


# -- who sees them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ADMIN_PAGES, "/playground"])
def test_nobody_sees_a_page_without_logging_in(box: Box, path: str) -> None:
    with visitor(box.url) as client:
        answer = client.get(path, headers={"accept": "text/html"})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login?next=%2F")


def test_a_member_sees_the_playground_and_no_page_for_admins(box: Box) -> None:
    with logged_in(box.url, "ada") as member:
        for path in ADMIN_PAGES:
            answer = member.get(path, headers={"accept": "text/html"})
            assert answer.status_code == 403, path
            assert "for admins" in answer.text
        assert f'<option value="{FAKE}">' in member.get("/playground").text


@pytest.mark.parametrize("path", [*ADMIN_PAGES, "/playground"])
def test_an_admin_sees_pages_without_inline_scripts_and_styles(
    admin: httpx.Client, path: str
) -> None:
    answer = admin.get(path)
    page = Page(answer)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for tag, attributes in page.tags:
        assert "style" not in attributes and tag != "style", (tag, attributes)
        assert tag != "script" or attributes.get("src"), attributes
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for source in (attributes.get("src"), attributes.get("href") if tag == "link" else None):
            assert source is None or admin.get(source).status_code == 200, source


# -- what is on them -------------------------------------------------------------------------------


def test_the_keys_on_the_page_are_those_of_the_endpoint(
    admin: httpx.Client, key: dict[str, Any]
) -> None:
    page = Page(admin.get("/admin/keys?show=all"))
    listed = sent(admin, "GET", "/v1/admin/keys")["data"]
    assert page.items == listed
    assert key["key"] not in page.text and key["last_four"] in page.text
    assert "77 requests/min" in page.text


def test_hostile_names_are_text_on_every_page(admin: httpx.Client, key: dict[str, Any]) -> None:
    for path in ("/admin/keys", "/admin/audit", "/admin/receipts"):
        answer = admin.get(path)
        assert "<script>alert" not in answer.text
        assert key["name"] in Page(answer).text


def test_keys_are_found_by_the_beginning_of_their_name_or_secret(
    admin: httpx.Client, key: dict[str, Any]
) -> None:
    def found(query: str) -> list[str]:
        return [one["id"] for one in sent(admin, "GET", f"/v1/admin/keys?{query}")["data"]]

    assert found("q=%3Cscript") == [key["id"]]
    assert found(f"q={key['key']}") == [key["id"]]
    assert found(f"q={key['prefix']}&account=ada") == []
    assert found("q=nobody") == []
    gone = sent(admin, "POST", "/v1/admin/keys", {"name": "gone"})
    sent(admin, "POST", f"/v1/admin/keys/{gone['id']}/revoke")
    assert found("q=gone") == [gone["id"]] and found("q=gone&usable=true") == []
    assert "No key fits" in Page(admin.get("/admin/keys?q=gone")).text
    assert "unknown" in Page(admin.get("/admin/keys?account=unknown")).text


def test_accounts_come_with_their_pages_in_links(admin: httpx.Client, box: Box) -> None:
    page = Page(admin.get("/admin/accounts"))
    listed = sent(admin, "GET", "/v1/admin/accounts")["data"]
    assert page.items == listed
    assert "/admin/keys?account=ada" in page.links()


def test_engines_are_shown_with_why_they_are_where_they_are(
    admin: httpx.Client, box: Box, key: dict[str, Any]
) -> None:
    sent(admin, "POST", "/v1/admin/models/load", {"model": FAKE})
    page = Page(admin.get("/admin/engines"))
    (engine,) = sent(admin, "GET", "/v1/engines")["data"]
    assert engine["why"] in page.text and engine["tokens_computed"] > 0
    assert {"model": FAKE, "pinned": False} in page.items
    (device, *_) = sent(admin, "GET", "/v1/admin/devices")["data"]
    assert device["description"] in page.text


def test_a_model_is_pinned_until_the_box_stops(admin: httpx.Client) -> None:
    def pinned() -> bool:
        models = sent(admin, "GET", "/v1/admin/models")["data"]
        return bool(next(model["pinned"] for model in models if model["id"] == FAKE))

    assert not pinned()
    made = sent(admin, "POST", "/v1/admin/models/pin", {"model": FAKE})
    assert (made["pinned"], made["configured"]) == (True, False) and pinned()
    sent(admin, "POST", "/v1/admin/models/load", {"model": FAKE, "keep_alive": 0})
    assert [one["pinned"] for one in sent(admin, "GET", "/v1/engines")["data"]] == [True]
    sent(admin, "POST", "/v1/admin/models/pin", {"model": FAKE, "pinned": False})
    assert not pinned()
    unknown = admin.post("/v1/admin/models/pin", json={"model": "none:1"})
    assert unknown.status_code == 404


def test_models_are_listed_with_what_operators_decide_by(admin: httpx.Client) -> None:
    page = Page(admin.get("/admin/models?q=code+apache"))
    models = {model["id"]: model for model in sent(admin, "GET", "/v1/admin/models")["data"]}
    bundled = models["smollm2:135m"]
    assert (bundled["license"], bundled["price"]["prompt"]) == ("Apache-2.0", "0.2")
    assert bundled["parameters"] > 1e8 and bundled["quantisation"]
    assert {item["model"] for item in page.items} == {*models, "qwen2.5-coder:7b"}
    known = sent(admin, "GET", "/v1/admin/models/known?q=code+apache")["data"]
    assert [model["name"] for model in known] == ["qwen2.5-coder:7b"]
    assert not known[0]["served"] and known[0]["memory"] > known[0]["size"]
    shown = Page(admin.get("/admin/models/show?model=smollm2:135m"))
    assert "8,192" in shown.text and "Apache License" in shown.text


def test_the_audit_trail_is_filtered_by_actor_action_target_and_time(
    admin: httpx.Client, key: dict[str, Any]
) -> None:
    def entries(query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = sent(admin, "GET", f"/v1/admin/audit?{query}")["data"]
        return found

    by_owner = entries("actor=owner&limit=1000")
    assert by_owner and {one["actor_name"] for one in by_owner} == {"owner"}
    assert {one["action"].partition(".")[0] for one in entries("action=key")} == {"key"}
    assert {one["action"] for one in entries("action=key.create")} == {"key.create"}
    assert [one["target"] for one in entries(f"target={key['id']}")] == [key["id"]]
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
    assert entries(f"since={tomorrow}") == [] and entries(f"until={tomorrow}&limit=1")
    page = Page(admin.get("/admin/audit?action=key.create&actor=owner"))
    assert key["name"] in page.text and "owner" in page.text
    assert "is not a time" in Page(admin.get("/admin/audit?since=yesterday")).text


def test_receipts_are_filtered_and_come_as_csv(
    admin: httpx.Client, box: Box, key: dict[str, Any]
) -> None:
    others = ask_fake_model(box)
    today = datetime.now(UTC).date()

    def found(query: str) -> list[str]:
        listed = sent(admin, "GET", f"/v1/receipts?{query}")["data"]
        return [receipt["request_id"] for receipt in listed]

    account = key["account"]
    assert found(f"account={account}") == found(f"key={key['id']}") == [key["request_id"]]
    assert {key["request_id"], others} <= set(found(f"start_date={today - timedelta(1)}"))
    assert found(f"start_date={today + timedelta(1)}") == []
    assert found(f"end_date={today - timedelta(1)}") == []
    page = Page(admin.get(f"/admin/receipts?account={account}"))
    assert f"/explorer/r/{key['request_id']}" in page.links()
    answer = admin.get(f"/v1/receipts?format=csv&account={account}&limit=1")
    assert answer.headers["content-type"].startswith("text/csv")
    (line,) = csv.DictReader(io.StringIO(answer.text))
    assert line["request_id"] == key["request_id"] and line["key_name"] == key["name"]
    assert (line["account_name"], line["model"]) == (account, FAKE)
    receipt = sent(admin, "GET", f"/v1/receipts/{key['request_id']}")
    assert line["amount"] == receipt["payment_amount"] and line["completion_tokens"] == "3"
    everything = list(csv.DictReader(io.StringIO(admin.get("/v1/receipts?format=csv").text)))
    assert [one["request_id"] for one in everything] == found("limit=1000")


def test_a_member_gets_only_the_receipts_of_its_account(box: Box, key: dict[str, Any]) -> None:
    with logged_in(box.url, "ada") as member:
        assert member.get(f"/v1/receipts?account={key['account']}").status_code == 403
        assert member.get("/v1/receipts?format=csv").text.count("\n") == 1  # the names of columns


def test_a_formula_in_a_name_is_text_in_csv(admin: httpx.Client) -> None:
    made = sent(admin, "POST", "/v1/admin/keys", {"name": "=cmd|' /C calc'!A0"})
    headers = {"authorization": f"Bearer {made['key']}"}
    chat = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert admin.post("/v1/chat/completions", json=chat, headers=headers).status_code == 200
    text = admin.get(f"/v1/receipts?format=csv&key={made['id']}").text
    (line,) = csv.DictReader(io.StringIO(text))
    assert line["key_name"] == "'=cmd|' /C calc'!A0"


# -- peers -----------------------------------------------------------------------------------------


def test_a_box_without_peering_says_how_to_turn_it_on(admin: httpx.Client) -> None:
    assert "pinaivu serve --peering" in Page(admin.get("/admin/peers")).text


@pytest.mark.anyio
async def test_the_page_of_peers_shows_this_box_and_invites_with_a_code(tmp_path: Path) -> None:
    async with in_process_box(MemoryNetwork(), tmp_path / "a") as one:
        alone = Page(await one.page("/admin/peers"))
        assert "The ticket" in alone.text and one.node_id in str(alone.tags)
        made = (await one.http("POST", "/v1/admin/peers/invitations", json={"qr": True})).json()
        assert made["qr"].startswith("<svg") and "style" not in made["qr"]
        plain = (await one.http("POST", "/v1/admin/peers/invitations", json={})).json()
        assert plain["qr"] == "" and plain["ticket"] != made["ticket"]


# -- what was set, in words ------------------------------------------------------------------------


def test_of_a_change_the_audit_trail_shows_what_differs() -> None:
    before = {"policy": {"rpm": 30, "scopes": ["usage", "admin"]}, "name": "a"}
    after = {"policy": {"rpm": 31, "scopes": ["usage", "admin"]}, "name": "b"}
    changed = list(lines_of({"before": before, "after": after}))
    assert changed == [("rpm", "30 → 31"), ("name", "a → b")]
    assert list(lines_of({"before": "admin", "after": "member"})) == [
        ("before", "admin"), ("after", "member"),
    ]  # fmt: skip
    made = {"name": "x", "policy": {"models": ["a", "b"], "budget": {"amount": "5"}}, "at": None}
    assert list(lines_of(made)) == [
        ("name", "x"), ("models", "a, b"), ("budget", '{"amount":"5"}'),
    ]  # fmt: skip
