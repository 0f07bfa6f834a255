"""`/docs` shows every endpoint of `/openapi.json`, in a browser."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from pinaivu_box.server.endpoints import ENDPOINTS
from pinaivu_box.server.openapi import specification
from tests.browser.conftest import OpenWindow
from tests.support.process_box import Box

API = specification(ENDPOINTS)


def operations(api: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, one) for path, ms in api["paths"].items() for method, one in ms.items()]


def shown(page: Page) -> Locator:
    return page.locator(".docs-operation:visible")


def open_everything(page: Page) -> None:
    """Types within types, too: each names itself no second time, so there is an end."""
    page.evaluate(
        """async () => {
          const closed = () => [...document.querySelectorAll("details:not([open])")];
          while (closed().length) {
            closed().forEach((one) => { one.open = true; });
            await new Promise((done) => setTimeout(done));
          }
        }"""
    )


def test_every_operation_opens_with_all_that_it_takes_and_gives(
    fake_box: Box, open_window: OpenWindow
) -> None:
    page = open_window(fake_box.url).page
    page.goto("/docs")
    expect(page.locator(".docs-operation")).to_have_count(len(operations(API)))
    open_everything(page)
    assert page.locator(".docs-operation pre").count() == 0  # which is for what cannot be drawn
    texts: dict[str, str] = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".docs-operation")]
             .map((one) => [one.id, one.textContent]))"""
    )
    for method, path, one in operations(API):
        text = texts[one["operationId"]]
        assert all(part in text for part in (method, path, one["summary"]))
        assert all(parameter["name"] in text for parameter in one["parameters"])
        contents = [one.get("requestBody", {}).get("content", {})]
        contents += [one["responses"]["200"]["content"]]
        for kind, media in (item for content in contents for item in content.items()):
            assert kind == "application/json" or kind in text
            if "$ref" in media["schema"]:
                name = media["schema"]["$ref"].split("/")[-1]
                assert name in text
                fields = API["components"]["schemas"][name].get("properties", {})
                assert all(field in text for field in fields), (path, name)


def test_an_operation_has_an_address(fake_box: Box, open_window: OpenWindow) -> None:
    page = open_window(fake_box.url).page
    page.goto("/docs#post_embeddings")
    expect(page.locator("#post_embeddings > .docs-inside")).to_be_visible()
    expect(page.locator(".docs-operation[open]")).to_have_count(1)
    page.locator("#get_models > summary").click()
    expect(page).to_have_url(f"{fake_box.url}/docs#get_models")
    page.goto("/docs#no%FFsuch")  # an address that somebody made up opens nothing
    page.goto("/docs#post_tokenize")
    expect(page.locator("#post_tokenize")).to_have_attribute("open", "")


def test_the_search_finds_paths_summaries_and_fields(
    fake_box: Box, open_window: OpenWindow
) -> None:
    page = open_window(fake_box.url).page
    page.goto("/docs")
    query = page.get_by_label("Find an endpoint")
    query.fill("POST embeddings openai")
    expect(shown(page)).to_have_count(0)
    query.fill("post /V1/embeddings")
    expect(shown(page)).to_have_count(1)
    query.fill("dimensions")  # a field of its body
    expect(page.locator("#post_embeddings")).to_be_visible()
    query.fill("revoke a key")
    expect(page.locator("#post_admin_keys_key_id_revoke")).to_be_visible()
    expect(page.locator("#post_embeddings")).to_be_hidden()
    query.press("Enter")  # sends no form anywhere
    expect(page).to_have_url(f"{fake_box.url}/docs")
    query.fill("")
    expect(shown(page)).to_have_count(len(operations(API)))


def test_the_page_works_with_the_keyboard_alone(fake_box: Box, open_window: OpenWindow) -> None:
    page = open_window(fake_box.url).page
    page.goto("/docs")
    query = page.get_by_label("Find an endpoint")
    query.focus()
    page.keyboard.type("/v1/tokenize")
    expect(shown(page)).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.locator("#post_tokenize > summary")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#post_tokenize > .docs-inside")).to_be_visible()


def test_without_scripts_the_page_names_the_document(
    fake_box: Box, open_window: OpenWindow
) -> None:
    page = open_window(fake_box.url, java_script_enabled=False).page
    page.goto("/docs")
    expect(page.get_by_label("Find an endpoint")).to_be_hidden()
    link = page.locator("noscript a")
    expect(link).to_have_attribute("href", "/openapi.json")


def test_the_page_works_below_the_path_of_a_proxy(fake_box: Box, open_window: OpenWindow) -> None:
    window = open_window(fake_box.url)
    asked: list[str] = []

    def as_a_proxy_does(route: Route) -> None:
        path = route.request.url.removeprefix(fake_box.url)
        asked.append(path)
        assert path.startswith("/box/"), path
        headers = {**route.request.headers, "x-forwarded-prefix": "/box"}
        url = fake_box.url + path.removeprefix("/box")
        route.fulfill(response=route.fetch(url=url, headers=headers))

    window.context.route("**/*", as_a_proxy_does)
    for path in ("/box/docs", "/box/docs/"):
        window.page.goto(path)
        expect(shown(window.page)).to_have_count(len(operations(API)))
    assert "/box/openapi.json" in asked


ODD: dict[str, dict[str, Any] | None] = {
    "no answer": {"summary": "x", "responses": {}},
    "no content": {"summary": "x", "responses": {"204": {"description": "done"}}},
    "bytes": {
        "summary": "x",
        "requestBody": {"content": {"application/octet-stream": {}}},
        "responses": {"200": {"content": {"text/csv": {"schema": {"type": "string"}}}}},
    },
    "no schema": {"summary": "x", "responses": {"200": {"content": {"application/json": {}}}}},
    "any": {"responses": {"200": {"content": {"application/json": {"schema": True}}}}},
    "a form": {
        "summary": "x",
        "requestBody": {
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"file": {"type": "string"}}}
                }
            }
        },
        "responses": {"default": {"description": "either"}},
    },
    "a wrong reference": {
        "summary": "x",
        "responses": {
            "200": {"content": {"application/json": {"schema": {"$ref": "#/components/no"}}}}
        },
    },
    "no parameters' schemas": {"parameters": [{"name": "a", "in": "query"}], "responses": {}},
    "nonsense": {"summary": "x", "responses": {"200": None}},
    "hostile": {"summary": "<img src=x onerror=alert(1)>", "operationId": "a b", "responses": {}},
    "nothing": None,
}


def test_no_operation_stops_the_page(fake_box: Box, open_window: OpenWindow) -> None:
    api = copy.deepcopy(API)
    odd = {f"/odd/{number}": {"get": one} for number, one in enumerate(ODD.values())}
    api["paths"] = {**odd, **api["paths"]}
    window = open_window(fake_box.url)
    window.context.route("**/openapi.json", lambda route: route.fulfill(json=api))
    window.page.goto("/docs")
    expect(window.page.locator(".docs-operation")).to_have_count(len(operations(api)))
    open_everything(window.page)
    for path in odd:
        assert window.page.locator("summary code", has_text=path).count() >= 1
    assert window.page.locator("main img").count() == 0


@pytest.mark.parametrize(
    "answer", [{"status": 503, "body": "{}"}, {"body": "no JSON"}, {"json": {}}]
)
def test_a_document_that_cannot_be_read_is_said(
    fake_box: Box, open_window: OpenWindow, answer: dict[str, Any]
) -> None:
    window = open_window(fake_box.url)
    window.allow("status of 503")
    window.context.route("**/openapi.json", lambda route: route.fulfill(**answer))
    window.page.goto("/docs")
    expect(window.page.get_by_text("The description could not be shown")).to_be_visible()
