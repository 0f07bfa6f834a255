"""The dashboard and the pages of one's own usage: who sees them, and that they tell the truth."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.server.app import create_app
from pinaivu_box.server.pages.filters import milliseconds
from pinaivu_box.store.times import now_ms
from tests.support.fake_model import FAKE
from tests.support.in_process_box import in_process_box
from tests.support.memory_transport import MemoryNetwork
from tests.support.pages import logged_in, make_account, make_owner, visitor
from tests.support.process_box import Box, StartBox, wait_until

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
EVIL = '<b>x</b>"&\u202eevil' + "-long" * 8
CONFIG = """
[server]
contact = "ops@lab.example"
[pricing]
currency = "EUR"
per_1k_tokens = "0.0123"
"""


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def box(module_box: StartBox, keys: dict[str, str]) -> Box:
    """Two accounts have made requests, one of them with a key of a hostile name."""
    started = module_box("--model", f"{FAKE}=fake:1", config=CONFIG)
    make_owner(started.home)
    for name in ("ada", "bob", "newcomer"):
        make_account(started.home, name)
    for account, name in (("ada", EVIL), ("ada", "laptop"), ("bob", "ci")):
        called = "evil" if name == EVIL else name  # no new key may be called that
        answer = started.http("POST", "/v1/admin/keys", json={"account": account, "name": called})
        assert answer.status_code == 200, answer.text
        keys[name] = answer.json()["key"]
    database = sqlite3.connect(started.home / "pinaivu.db", timeout=60)
    with database:
        database.execute("UPDATE keys SET name = ? WHERE name = 'evil'", (EVIL,))
    database.close()
    for name, times in ((EVIL, 2), ("laptop", 1), ("ci", 3)):
        for _ in range(times):
            chat(started, keys[name])
    refused = started.http("POST", "/v1/chat/completions", key=keys["ci"], json={"model": "no"})
    assert refused.status_code in (404, 422)
    wait_until(lambda: errors_of(started) > 0, "the refusal to be counted")
    return started


def chat(box: Box, key: str) -> str:
    body = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    answer = box.http("POST", "/v1/chat/completions", key=key, json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def errors_of(box: Box) -> int:
    return sum(box.http("GET", "/v1/usage").json()["errors"].values())


@pytest.fixture
def owner(box: Box) -> Iterator[httpx.Client]:
    with logged_in(box.url, "owner") as client:
        yield client


@pytest.fixture
def ada(box: Box) -> Iterator[httpx.Client]:
    with logged_in(box.url, "ada") as client:
        yield client


def page(client: httpx.Client, path: str, status: int = 200) -> str:
    answer = client.get(path, headers=HTML)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=\"|<script(?![^>]*\ssrc=)", answer.text)
    return answer.text


def figure(text: str, label: str) -> str:
    found = re.search(rf"<dt>{label}</dt><dd[^>]*>([^<]*)</dd>", text)
    assert found, f"no figure {label}"
    return unescape(found[1]).strip()


def row_of(text: str, name: str) -> str:
    """The line of a part."""
    parts = text.split('id="parts"', 1)[1]
    found = re.search(rf">{re.escape(escaped(name))}</bdi>.*?</tr>", parts, re.DOTALL)
    assert found, f"no line {name}"
    return found[0]


def sums_of(text: str, name: str) -> list[str]:
    """The figures of the line of a part."""
    return re.findall(r'class="numeric"[^>]*>([^<]*)<', row_of(text, name))


# -- who sees what ---------------------------------------------------------------------------------


def test_a_visitor_is_sent_to_the_login_and_comes_back(box: Box) -> None:
    with visitor(box.url) as client:
        for path in ("/dashboard?period=7d", "/usage", "/keys", "/receipts"):
            answer = client.get(path, headers=HTML)
            assert answer.status_code == 303
            assert answer.headers["location"].startswith("/login?next=%2F")


def test_the_dashboard_is_for_admins(ada: httpx.Client) -> None:
    text = page(ada, "/dashboard", 403)
    assert "ops@lab.example" in text and "<h1>" in text
    assert ada.get("/dashboard/figures").status_code == 403
    assert ada.get("/v1/admin/events").status_code == 403


def test_navigation_is_that_of_the_role(owner: httpx.Client, ada: httpx.Client) -> None:
    for client, admin in ((owner, True), (ada, False)):
        text = page(client, "/usage")
        for path in ("/chat", "/usage", "/keys", "/receipts", "/playground", "/logout"):
            assert f'href="{path}"' in text
        for path in ("/dashboard", "/admin/models", "/admin/audit"):
            assert (f'href="{path}"' in text) is admin
        assert '<a href="/usage" aria-current="page">' in text


def test_a_page_needs_the_scope_that_its_key_has_not(box: Box) -> None:
    make_account(box.home, "limited")
    with logged_in(box.url, "limited") as client:
        (key,) = box.http("GET", "/v1/admin/keys?account=limited").json()["data"]
        policy = {"policy": {"scopes": ["inference"]}}
        changed = box.http("PATCH", f"/v1/admin/keys/{key['id']}", json=policy)
        assert changed.status_code == 200
        for path in ("/usage", "/keys", "/receipts"):
            page(client, path, 403)


# -- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", ["24h", "7d", "30d"])
def test_the_dashboard_has_the_figures_of_the_usage_report(
    box: Box, owner: httpx.Client, period: str
) -> None:
    for path in (f"/dashboard?period={period}", f"/dashboard/figures?period={period}"):
        report, text = wait_until(lambda path=path: both(box, owner, path), "no more errors")
        assert figure(text, "Requests") == f"{report['total_requests']:,}"
        assert figure(text, "Errors") == f"{sum(report['errors'].values()):,}"
        assert figure(text, "Tokens") == f"{report['total_tokens']:,}"
        assert figure(text, "Cost").endswith(" EUR")
        assert "Time to first token" in text and "this box" in text
        assert "Time of the whole answer" in text  # its chart
        assert figure(text, "Whole answer") == milliseconds(report["total_ms"]["p50"])
        for account, name, requests in (("ada", EVIL, 2), ("bob", "ci", 3)):
            group = next(each for each in report["data"] if each["key_name"] == name)
            assert group["requests"] == requests and group["account_name"] == account
            line = sums_of(text, name)
            assert line[0] == f"{requests:,}" and line[1] == f"{group['tokens']:,}"
            assert line[3] == f"{sum(group['errors'].values()):,}"
            for kind in ("ttft_ms", "total_ms"):
                assert f">{milliseconds(group[kind]['p50'])}</td>" in row_of(text, name)


def both(box: Box, client: httpx.Client, path: str) -> tuple[Any, str] | None:
    """The usage report and a page of the same moment: errors are counted a second later."""
    by = {"group_by": "account,key"}
    before = box.http("GET", "/v1/usage", params=by).json()
    text = page(client, path)
    after = box.http("GET", "/v1/usage", params=by).json()
    return (after, text) if before["data"] == after["data"] else None


def escaped(text: str) -> str:
    return (
        text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")
    )


def test_a_hostile_name_stays_text_and_is_isolated(owner: httpx.Client, ada: httpx.Client) -> None:
    for client, path in (
        (owner, "/dashboard"), (ada, "/usage"), (ada, "/keys"), (ada, "/receipts")
    ):  # fmt: skip
        text = page(client, path)
        assert "<b>x" not in text and escaped(EVIL) in text
        assert f'<bdi title="{escaped(EVIL)}">{escaped(EVIL)}</bdi>' in text


def test_an_account_sees_its_own_usage(box: Box, ada: httpx.Client, owner: httpx.Client) -> None:
    report = ada.get("/v1/usage").json()
    for period, days in (("24h", 1), ("7d", 6)):
        text = page(ada, f"/usage?period={period}")
        first = datetime.now(UTC) - timedelta(days=days)
        since = re.search(r"start_date=([^\"&]*)", text)
        assert since and since[1] <= f"{first + timedelta(hours=1):%Y-%m-%d}"
        assert figure(text, "Requests") == str(report["total_requests"]) == "3"
        assert figure(text, "Tokens") == str(report["total_tokens"])
        assert ">ci<" not in text and "bob" not in text
    link = unescape(re.findall(r'href="(/v1/usage\?[^"]*)"', text)[0])
    lines = ada.get(link).text.splitlines()
    used = [line for line in lines if f",{FAKE}," in line]
    assert len(used) == 2 and lines[0].startswith("day,model,key,")
    # An admin's own usage is not that of the box.
    assert "No requests yet" in page(owner, "/usage?period=7d")


def test_what_is_left_of_limits_is_shown(box: Box, ada: httpx.Client, keys: dict[str, str]) -> None:
    policy = {"rpm": 60, "tpm": 9000, "budget": {"amount": "5", "period": "30d"}}
    body = {"account": "ada", "name": "limited", "policy": policy}
    secret = box.http("POST", "/v1/admin/keys", json=body).json()["key"]
    before = page(ada, "/usage")
    assert "60 of 60 left" in before and "5 of 5 EUR left" in before
    chat(box, secret)
    after = page(ada, "/usage")
    assert "59 of 60 left" in after and "9,000 of 9,000 left" not in after
    assert "5 of 5 EUR left" not in after


def test_receipts_are_listed_filtered_and_lead_to_the_explorer(
    box: Box, ada: httpx.Client, keys: dict[str, str]
) -> None:
    mine, other = chat(box, keys["laptop"]), chat(box, keys["ci"])
    text = page(ada, "/receipts")
    assert f'href="/explorer/r/{mine}"' in text and other not in text
    listed = box.http("GET", "/v1/admin/keys?account=ada").json()["data"]
    key = next(each for each in listed if each["name"] == "laptop")
    filtered = page(ada, f"/receipts?key={key['id']}&model={FAKE}")
    assert mine in filtered and escaped(EVIL) not in filtered.split("<tbody>")[1]
    assert "No receipt fits" in page(ada, "/receipts?model=none")
    assert "No receipt fits" in page(ada, "/receipts?key=nobodys")


def test_receipts_come_in_pages(box: Box, ada: httpx.Client) -> None:
    with logged_in(box.url, "newcomer") as client:
        assert "No receipts yet" in page(client, "/receipts")
    first = page(ada, "/receipts")
    ids = re.findall(r'href="/explorer/r/(req_[^"]*)"', first)
    rest = page(ada, f"/receipts?after={ids[0]}")
    assert re.findall(r'href="/explorer/r/(req_[^"]*)"', rest) == ids[1:]


def test_keys_are_listed_without_secrets(ada: httpx.Client, keys: dict[str, str]) -> None:
    text = page(ada, "/keys")
    assert ">laptop</bdi>" in text and ">ci</bdi>" not in text
    assert keys["laptop"] not in text and keys["laptop"][-4:] in text


def test_the_first_request_is_shown_with_the_address_of_the_box(box: Box) -> None:
    with logged_in(box.url, "newcomer") as client:
        for path in ("/usage", "/keys", "/receipts"):
            text = unescape(page(client, path))
            assert f"curl {box.url}/v1/chat/completions" in text and FAKE in text
        proxied = client.get("/keys", headers={**HTML, "x-forwarded-prefix": "/box"}).text
        assert f"{box.url}/box/v1/chat/completions" in unescape(proxied)


# -- live ------------------------------------------------------------------------------------------


class Follower:
    """Reads a stream of events in a thread, until the box ends it."""

    def __init__(self, client: httpx.Client, **headers: str) -> None:
        self.events: list[tuple[str, Any]] = []
        self.status = 0
        self._client, self._headers = client, {"accept": "text/event-stream", **headers}
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with self._client.stream("GET", "/v1/admin/events", headers=self._headers) as answer:
            self.status = answer.status_code
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.events.append((name, json.loads(line.removeprefix("data: "))))

    def of(self, name: str) -> list[Any]:
        return [data for event, data in list(self.events) if event == name]


def test_a_request_is_seen_when_it_has_ended_and_the_stream_ends_with_the_session(
    box: Box, keys: dict[str, str]
) -> None:
    with logged_in(box.url, "owner") as client, logged_in(box.url, "owner") as reader:
        follower = Follower(reader)
        wait_until(lambda: follower.of("now"), "the first event")
        request_id = chat(box, keys[EVIL])
        (seen,) = wait_until(lambda: follower.of("finished"), "the request to be seen")
        assert seen["request_id"] == request_id and seen["status"] == 200
        assert (seen["key_name"], seen["account_name"]) == (EVIL, "ada")
        assert seen["node_name"] == "this box" and seen["completion_tokens"] > 0
        wait_until(lambda: follower.of("sums"), "the sums to be told of")
        text = page(client, "/dashboard")
        assert request_id in text.split("Finished lately", 1)[1]
        with visitor(box.url) as other:
            other.cookies.update(reader.cookies)
            other.headers["x-csrf-token"] = reader.headers["x-csrf-token"]
            assert other.delete("/v1/session").status_code == 200
        wait_until(lambda: not follower.thread.is_alive(), "the stream to end")


def test_a_reader_that_comes_back_gets_what_has_ended_meanwhile(
    box: Box, keys: dict[str, str]
) -> None:
    known, *missed = [chat(box, keys["ci"]) for _ in range(3)]
    wait_until(lambda: ended(box, missed[-1]), "the requests to be seen")
    for last in (known, "req_of_another_start"):
        with logged_in(box.url, "owner") as reader:
            follower = Follower(reader, **{"last-event-id": last})
            wait_until(lambda: len(follower.of("finished")) >= 2, "what was missed")  # noqa: B023
            seen = [each["request_id"] for each in follower.of("finished")]
            assert seen[-2:] == missed and (known in seen) is (last != known)
            reader.delete("/v1/session")
            wait_until(lambda: not follower.thread.is_alive(), "the stream to end")  # noqa: B023


def test_a_refusal_is_told_of_as_a_change_of_the_sums(box: Box, keys: dict[str, str]) -> None:
    with logged_in(box.url, "owner") as reader:
        follower = Follower(reader)
        wait_until(lambda: follower.of("now"), "the first event")
        body = {"model": "no", "messages": [{"role": "user", "content": "Hi"}]}
        answer = box.http("POST", "/v1/chat/completions", key=keys["ci"], json=body)
        assert answer.status_code == 404
        wait_until(lambda: follower.of("sums"), "the sums to be told of")
        assert not follower.of("finished")
        reader.delete("/v1/session")
        wait_until(lambda: not follower.thread.is_alive(), "the stream to end")


def test_only_requests_with_a_receipt_lead_to_one(box: Box, keys: dict[str, str]) -> None:
    request_id = chat(box, keys["ci"])
    assert wait_until(lambda: ended(box, request_id), "the request to be seen")["receipt"]
    with logged_in(box.url, "owner") as client:
        text = page(client, "/dashboard")
    assert f'<tr data-request="{request_id}">' in text
    assert f'href="/explorer/r/{request_id}"' in text


def test_programs_may_look_once(box: Box, keys: dict[str, str]) -> None:
    request_id = chat(box, keys["ci"])
    seen = wait_until(lambda: ended(box, request_id), "the request to be seen")
    assert seen["key_name"] == "ci" and seen["cost"] and seen["currency"] == "EUR"


def ended(box: Box, request_id: str) -> Any:
    found = box.http("GET", "/v1/admin/events").json()
    assert found["count"] >= len(found["running"])
    return next((each for each in found["finished"] if each["request_id"] == request_id), None)


def test_the_stream_ends_with_the_key(box: Box) -> None:
    body = {"account": "owner", "name": "watch", "policy": {"scopes": ["admin"]}}
    made = box.http("POST", "/v1/admin/keys", json=body).json()
    with visitor(box.url) as client:
        follower = Follower(client, authorization=f"Bearer {made['key']}")
        wait_until(lambda: follower.of("now"), "the first event")
        assert box.http("POST", f"/v1/admin/keys/{made['id']}/revoke").status_code == 200
        wait_until(lambda: not follower.thread.is_alive(), "the stream to end")


def test_a_box_that_shuts_down_begins_no_stream(tmp_path: Path) -> None:
    async def ask() -> int:
        async with in_process_box(MemoryNetwork(), tmp_path / "anna") as one:
            one.box.admission.drain()
            app = httpx.ASGITransport(create_app(one.box))
            headers = {"accept": "text/event-stream", "authorization": f"Bearer {one.secret}"}
            async with httpx.AsyncClient(transport=app, base_url="http://box") as client:
                answer = await client.get("/v1/admin/events", headers=headers)
                return answer.status_code

    assert asyncio.run(ask()) == 503


@pytest.mark.parametrize(
    "change", [{"blocked": "unpaid"}, {"policy": {"networks": ["10.0.0.0/8"]}}]
)
def test_the_stream_ends_when_the_pages_of_the_account_may_no_more(
    box: Box, change: dict[str, Any]
) -> None:
    make_account(box.home, "watcher", role="admin")
    with logged_in(box.url, "watcher") as reader:
        key_id = reader.get("/v1/account").json()["pages_key"]["id"]
        path = f"/v1/admin/keys/{key_id}"
        former: dict[str, Any] = {"blocked": None, "policy": {"networks": []}}
        follower = Follower(reader)
        wait_until(lambda: follower.of("now"), "the first event")
        assert box.http("PATCH", path, json=change).status_code == 200
        wait_until(lambda: not follower.thread.is_alive(), "the stream to end")
        assert box.http("PATCH", path, json=former).status_code == 200


def test_times_are_kept_by_the_hour_for_a_week(box: Box) -> None:
    hour = now_ms() - now_ms() % 3_600_000
    database = sqlite3.connect(box.home / "pinaivu.db")
    with database:
        rows = database.execute(
            "SELECT since, sum(count) FROM latencies_by_hour GROUP BY 1"
        ).fetchall()
        assert rows and all(hour - 3_600_000 <= since <= hour for since, _ in rows)
    database.close()


# -- errors and what all pages share ---------------------------------------------------------------


def test_a_browser_gets_errors_as_pages_and_a_program_as_json(box: Box) -> None:
    with visitor(box.url) as client:
        text = page(client, "/no/such/page", 404)
        assert "There is no such page" in text and "req_" in text
        for headers in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
            answer = client.get("/no/such/page", headers=headers)
            assert answer.status_code == 404 and answer.json()["error"]["code"]
        assert client.get("/v1/no", headers=HTML).json()["error"]
        assert client.get("/static/no.css", headers=HTML).json()["error"]
        assert client.post("/no", headers=HTML).json()["error"]


def test_each_page_says_which_box_this_is(box: Box, ada: httpx.Client) -> None:
    text = page(ada, "/usage")
    node = re.search(r'data-copy="(node_[^"]*)"', text)
    assert node and node[1] in box.http("GET", "/v1/receipts?limit=1").text
    assert 'href="mailto:ops@lab.example"' in text and "Skip to the content" in text


def test_a_chosen_theme_is_in_the_page_and_nothing_else_is(ada: httpx.Client) -> None:
    marks = {name: f' data-theme="{name}"' for name in ("dark", "light")}
    for chosen, theme in {**marks, "'><b>": "", "system": ""}.items():
        cookies = "; ".join(f"{name}={value}" for name, value in ada.cookies.items())
        headers = {**HTML, "cookie": f"{cookies}; pinaivu_theme={chosen}"}
        text = ada.get("/usage", headers=headers).text
        root = re.search("<html[^>]*>", text)
        assert root and root[0] == f'<html lang="en"{theme}>'


def test_static_files_are_small_and_not_sent_twice(box: Box, ada: httpx.Client) -> None:
    text = page(ada, "/usage")
    size = len(text)
    for path in {*re.findall(r'(?:href|src)="(/static/[^"#]*)', text), "/static/page.js"}:
        answer = ada.get(path)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        size += len(answer.content)
        plain = ada.get(path, headers={"accept-encoding": "gzip;q=0, br"})
        assert answer.headers["content-encoding"] == "gzip" and plain.content == answer.content
        assert "content-encoding" not in plain.headers
        again = ada.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    assert size < 150_000


def test_the_keys_of_an_account_come_by_pages(box: Box) -> None:
    make_account(box.home, "collector")
    with logged_in(box.url, "collector") as client:
        for number in range(27):
            made = client.post("/v1/account/keys", json={"name": f"key-{number:02}"})
            assert made.status_code == 200, made.text
        first = page(client, "/keys")
        assert "content-encoding" not in client.get("/keys", headers=HTML).headers
        assert len(re.findall('data-own-name="key-', first)) == 25
        older = re.search(r'rel="next" href="(\?after=[^"]*)"', first)
        assert older
        second = page(client, f"/keys{older[1]}")
        assert re.findall('data-own-name="(key-[0-9]*)"', second) == ["key-01", "key-00"]
        assert 'rel="next"' not in second and 'rel="prev"' in second
