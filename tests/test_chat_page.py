"""The pages of chats, and what their scripts ask for: messages and answers as HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pinaivu_box.server.pages.markdown import render
from pinaivu_box.server.pages.render import STATIC
from tests.support.chats import ask, conversation, messages
from tests.support.fake_model import FAKE
from tests.support.pages import logged_in, make_account, visitor
from tests.support.process_box import UNDRAFTED, Box, StartBox

SLOW = "fake:20"
PAGES = ("/chat", "/chat/conv_unknown", "/memories")
MAX_FIRST_LOAD = 150_000  # bytes
HOSTILE = "<script>alert(1)</script> [x](javascript:alert(1)) **b**\u202e"


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    started = module_box(
        "--model", f"{FAKE}=fake:1", "--model", f"{SLOW}=fake:20", config=UNDRAFTED
    )
    make_account(started.home, "ada")
    make_account(started.home, "ben")
    return started


@pytest.fixture(scope="module")
def ada(box: Box) -> Iterator[httpx.Client]:
    with logged_in(box.url) as client:
        yield client


def shown(client: httpx.Client, conversation_id: str) -> list[dict[str, str | None]]:
    answer = client.get(f"/chat/{conversation_id}/messages")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, str | None]] = answer.json()["data"]
    return found


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def begin(client: httpx.Client, conversation_id: str, **fields: object) -> str:
    """Send a message and leave once its answer has begun; the answer's id."""
    path = f"/v1/conversations/{conversation_id}/answers"
    with client.stream("POST", path, json={"content": "Hello", **fields}) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
    answer: str = json.loads(first.removeprefix("data: "))["answer"]["id"]
    return answer


def loaded(page: httpx.Response, client: httpx.Client) -> dict[str, int]:
    """The bytes of what a browser loads for a page the first time, by address."""
    linked = re.findall(r'(?:src|href)="(/static/[^"#]*)', page.text)
    waiting, sizes = list(dict.fromkeys(linked)), {str(page.url): len(page.content)}
    while waiting:
        address = waiting.pop()
        if address in sizes:
            continue
        answer = client.get(address)
        assert answer.status_code == 200, address
        sizes[address] = len(answer.content)
        if ".js" in address:
            folder = address.split("?")[0].rpartition("/")[0]
            for name in re.findall(r'from "(\.[^"]+)"', answer.text):
                waiting.append(str(httpx.URL(f"http://x{folder}/").join(name).path))
    return sizes


@pytest.mark.parametrize("path", PAGES)
def test_whoever_has_not_logged_in_is_sent_to_the_login(box: Box, path: str) -> None:
    with visitor(box.url) as client:
        answer = client.get(path)
    assert answer.status_code in (302, 303)
    assert answer.headers["location"].startswith("/login?next=")


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_no_inline_script_or_style_and_load_little(ada: httpx.Client, path: str) -> None:
    page = ada.get(path)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", page.text)
    sizes = loaded(page, ada)
    assert any("chat.css" in address or "memories.css" in address for address in sizes)
    assert sum(sizes.values()) <= MAX_FIRST_LOAD, sizes


def test_scripts_insert_html_of_the_renderer_alone() -> None:
    """Whatever else they show is text."""
    inserting = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(")
    found = {
        (path.name, line.strip())
        for path in [STATIC / "chat.js", STATIC / "memories.js", *(STATIC / "chat").iterdir()]
        for line in path.read_text().splitlines()
        if inserting.search(line)
    }
    assert found == {
        ("view.js", 'if (typeof message.html === "string") this.done.innerHTML = message.html;'),
        ("view.js", 'for (const html of done) this.done.insertAdjacentHTML("beforeend", html);'),
        ("view.js", "if (open !== null) this.open.innerHTML = open;"),
    }


def test_answers_of_the_branch_that_is_shown_have_html(ada: httpx.Client) -> None:
    chat = conversation(ada)
    first = ask(ada, chat, "Hello")
    second = ask(ada, chat, parent=first["parent"])
    html = {message["id"]: message.get("html") for message in shown(ada, chat)}
    assert html == {
        first["parent"]: None,
        first["id"]: None,
        second["id"]: render(second["content"]),
    }
    ada.patch(f"/v1/conversations/{chat}", json={"leaf": first["id"]}).raise_for_status()
    html = {message["id"]: message.get("html") for message in shown(ada, chat)}
    assert html[first["id"]] == render(first["content"]) and html[second["id"]] is None


def test_an_answer_comes_in_blocks_that_are_the_whole_in_the_end(ada: httpx.Client) -> None:
    chat = conversation(ada, model=SLOW)
    answer = begin(ada, chat, max_tokens=60)
    html, seen = "", []
    with ada.stream("GET", f"/chat/{chat}/answers/{answer}") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for name, data in events(response):
            seen.append(name)
            html += "".join(data.get("done", []))
    assert seen[-1] == "finished" and set(seen[:-1]) == {"blocks"}
    (stored,) = [message for message in messages(ada, chat) if message["id"] == answer]
    assert html == render(stored["content"]) != ""


def test_who_comes_back_in_the_middle_of_an_answer_catches_up(ada: httpx.Client) -> None:
    chat = conversation(ada, model=SLOW)
    answer = begin(ada, chat)
    for _ in range(2):
        with ada.stream("GET", f"/chat/{chat}/answers/{answer}") as response:
            name, data = next(events(response))
        assert name == "blocks" and data["open"]
    running = {message["id"]: message for message in shown(ada, chat)}[answer]
    assert running["status"] == "running" and running.get("html") is None
    ada.post(f"/v1/conversations/{chat}/answers/{answer}/stop").raise_for_status()
    with ada.stream("GET", f"/chat/{chat}/answers/{answer}") as response:
        *blocks, (name, finished) = list(events(response))
    assert any(data.get("done") for _, data in blocks) and name == "finished"
    assert finished["answer"]["status"] == "stopped"


def test_a_title_that_is_given_while_an_answer_is_made_stays(ada: httpx.Client) -> None:
    chat = conversation(ada, model=SLOW)
    answer = begin(ada, chat)
    ada.patch(f"/v1/conversations/{chat}", json={"title": "Mine"}).raise_for_status()
    ada.post(f"/v1/conversations/{chat}/answers/{answer}/stop").raise_for_status()
    with ada.stream("GET", f"/chat/{chat}/answers/{answer}") as response:
        *_, (name, finished) = list(events(response))
    assert (name, finished["title"]) == ("finished", "Mine")
    assert ada.get(f"/v1/conversations/{chat}").json()["title"] == "Mine"


def test_hostile_text_of_a_model_is_text_on_the_page(ada: httpx.Client) -> None:
    imported = {
        "title": HOSTILE,
        "leaf": "b",
        "messages": [
            {"id": "a", "role": "user", "content": HOSTILE},
            {"id": "b", "role": "assistant", "parent": "a", "content": HOSTILE},
        ],
    }
    body = {"format": "pinaivu-chats", "version": 1, "conversations": [imported]}
    ada.post("/v1/conversations/import", json=body).raise_for_status()
    chat = ada.get("/v1/conversations").json()["data"][0]["id"]
    question, answer = shown(ada, chat)
    assert question.get("html") is None
    html = answer["html"]
    assert html is not None and "<strong>b</strong>" in html and "U+202E" in html
    assert "<script" not in html and "href" not in html and "\u202e" not in html
    assert "<script>alert" not in ada.get(f"/chat/{chat}").text


def test_nobody_reads_the_chats_of_another_account(box: Box, ada: httpx.Client) -> None:
    chat = conversation(ada)
    answer = ask(ada, chat, "Hello")["id"]
    paths = (f"/chat/{chat}/messages", f"/chat/{chat}/answers/{answer}")
    with logged_in(box.url, "ben") as ben:
        assert [ben.get(path).status_code for path in paths] == [404, 404]
    with visitor(box.url) as nobody:
        assert [nobody.get(path).status_code for path in paths] == [401, 401]
        headers = {"authorization": f"Bearer {box.key}"}
        assert {nobody.get(path, headers=headers).status_code for path in paths} <= {401, 403}
