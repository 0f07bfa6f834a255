"""Each page in both themes, on a phone and on a wide screen: it has no fault, fits, and people with
assistive technology can use it.  Then hostile text on pages, keys instead of a mouse, and changes
that pages make."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import pytest
from playwright.sync_api import Page, Route, expect

from pinaivu_box.server.pages.routes import PAGES
from tests.browser.conftest import OpenWindow
from tests.support.axe import serious_violations
from tests.support.browser import page_loaded, take_screenshot, what_is_too_wide
from tests.support.fake_model import FAKE
from tests.support.process_box import StartBox
from tests.support.seeded_box import (
    LONG,
    MARKUP,
    RIGHT_TO_LEFT,
    SCRIPTED,
    SeededBox,
    Visitor,
    seeded_box,
)

THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WIDTHS = (1440, 360)


class Look(NamedTuple):
    """Who looks at a page, a selector of what is there once it is complete, and what comes after
    its path."""

    who: Visitor
    complete: str = "main h1"
    query: str = ""


LOOKS = {
    "/docs": Look("visitor", ".docs-operation"),
    "/login": Look("visitor"),
    "/login/link/{token}": Look("visitor"),
    "/logout": Look("member"),
    "/signup": Look("visitor"),
    "/account": Look("member"),
    "/chat": Look("member", "#conversations a"),
    "/chat/{conversation_id}": Look("member", ".message.assistant table"),
    "/memories": Look("member", "#list li"),
    "/usage": Look("member"),
    "/keys": Look("member"),
    "/receipts": Look("member"),
    "/explorer": Look("admin", "table tbody tr"),
    "/explorer/r/{request_id}": Look("admin", "#result .verdict.ok"),
    "/explorer/network": Look("member"),
    "/dashboard": Look("admin"),
    "/admin/engines": Look("admin"),
    "/admin/models": Look("admin"),
    "/admin/models/show": Look("admin", query=f"?model={SCRIPTED}"),
    "/admin/keys": Look("admin", "table tbody tr"),
    "/admin/accounts": Look("admin", "table tbody tr"),
    "/admin/peers": Look("admin"),
    "/admin/receipts": Look("admin", "table tbody tr"),
    "/admin/audit": Look("admin", "table tbody tr"),
    "/playground": Look("admin"),
}
# What pages fetch, files, and addresses that lead to another page.
OTHERS: set[str] = {
    "/",
    "/openapi.json",
    "/static/{name:path}",
    "/login/oidc",
    "/login/oidc/callback",
    "/chat/{conversation_id}/messages",
    "/chat/{conversation_id}/answers/{message_id}",
    "/dashboard/figures",
    "/explorer/r/{request_id}/receipt.json",
}


@pytest.fixture(scope="module")
def seeded(module_box: StartBox, tmp_path_factory: pytest.TempPathFactory) -> SeededBox:
    return seeded_box(module_box, tmp_path_factory.mktemp("script"))


@pytest.mark.parametrize("path", [page.path for page in PAGES if page.path not in OTHERS])
def test_a_page_fits_in_both_themes_and_widths(
    seeded: SeededBox, open_window: OpenWindow, path: str
) -> None:
    look = LOOKS[path]
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies.get(look.who, {}))
    window.page.goto(path.format(**seeded.ids) + look.query)
    expect(window.page.locator(look.complete).first).to_be_visible()
    look_at(window.page, path)


def test_a_page_that_does_not_exist_is_a_page_too(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.allow("status of 404")
    window.page.goto("/nothing/here")
    expect(window.page.locator("h1")).to_be_visible()
    look_at(window.page, "/not-found")


def look_at(page: Page, path: str) -> None:
    """Looks in each theme and width.  Raises AssertionError with all that is wrong."""
    name = path.strip("/").replace("/", "-").replace("{", "").replace("}", "")
    wrong = []
    for theme in THEMES:
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            take_screenshot(page, f"{name}-{theme}-{width}")
            where = f"{theme}, {width} px"
            wrong += [f"{where}, too wide: {one}" for one in what_is_too_wide(page)]
            if (theme, width) in (("light", 1440), ("dark", 360)):  # each takes half a second
                wrong += [f"{where}: {one}" for one in serious_violations(page)]
    assert not wrong, "\n".join(wrong)


# -- hostile text ----------------------------------------------------------------------------------

# Of a rendered answer: elements that it must not have, and addresses that a click would lead to.
RENDERED = """(answer) => ({
  elements: [...answer.querySelectorAll("*")].map((one) => one.localName),
  handlers: [...answer.querySelectorAll("*")].flatMap((one) => one.getAttributeNames())
    .filter((name) => name.startsWith("on")),
  links: [...answer.querySelectorAll("a")].map((one) => one.protocol),
})"""


def test_what_a_model_says_is_never_more_than_text(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["member"])
    window.page.goto(f"/chat/{seeded.ids['conversation_id']}")
    answer = window.page.locator(".message.assistant .md")
    expect(answer.locator("table")).to_be_visible()
    rendered = answer.evaluate(RENDERED)
    assert not {"script", "style", "svg", "img", "iframe", "form"} & set(rendered["elements"])
    assert rendered["handlers"] == []
    assert set(rendered["links"]) <= {"https:"}
    expect(answer).to_contain_text('<img src=x onerror="alert(1)"><script>alert(2)</script>')
    expect(answer).to_contain_text("javascript:alert(3)")
    expect(answer).to_contain_text("U+202E")  # what would turn the text around is shown instead
    assert "\u202e" not in answer.inner_text()


def test_titles_and_names_are_shown_as_they_were_written(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["member"])
    page = window.page
    page.goto(f"/chat/{seeded.ids['conversation_id']}")
    expect(page.get_by_test_id("title")).to_contain_text(MARKUP)
    places = [page.get_by_test_id("title"), page.locator("a.conversation bdi").first]
    for place in places:  # so what is beside them keeps its order
        expect(place).to_have_css("unicode-bidi", re.compile("isolate"))
    page.goto("/memories")
    expect(page.get_by_test_id("memory-list")).to_contain_text(MARKUP)
    page.goto("/keys")
    for name in (MARKUP, RIGHT_TO_LEFT, LONG):
        cell = page.get_by_role("rowheader").locator("bdi").get_by_text(name, exact=True)
        expect(cell).to_have_css("unicode-bidi", re.compile("isolate"))


# -- without a mouse -------------------------------------------------------------------------------


def test_a_key_is_made_without_a_mouse(seeded: SeededBox, open_window: OpenWindow) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    page.goto("/keys")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    create = page.get_by_role("button", name="Create key").first
    expect(create).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#create")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#create")).to_be_hidden()
    expect(create).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#create").get_by_label("Name")).to_be_focused()
    page.keyboard.type("made by keys")
    page.keyboard.press("Enter")
    expect(page.locator("#secret-text")).to_contain_text("sk-pnv-")
    with page_loaded(page):
        page.keyboard.press("Escape")
    expect(page.get_by_role("rowheader", name="made by keys")).to_be_visible()


def test_the_menu_of_a_phone_opens_and_closes_without_a_mouse(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto("/admin/accounts")
    menu = page.locator("#menu")
    link = page.get_by_role("navigation", name="Pages").get_by_role("link", name="Dashboard")
    expect(link).to_be_hidden()
    menu.focus()
    page.keyboard.press("Enter")
    expect(link).to_be_visible()
    page.keyboard.press("Escape")
    expect(link).to_be_hidden()
    expect(menu).to_be_focused()


# -- what scripts do -------------------------------------------------------------------------------


def test_a_receipt_that_comes_late_replaces_no_other(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    page.goto(f"/playground?model={FAKE}")
    page.get_by_label("Max tokens").fill("4")
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/v1/receipts/*", hold)
    state = page.locator("#receipt-state")
    for number, text in enumerate(("First", "Second"), 1):
        page.locator("#message").fill(text)
        page.locator("#message").press("ControlOrMeta+Enter")
        while len(held) < number:
            page.wait_for_timeout(20)
        expect(page.locator("#send")).to_be_visible()
    first, second = held
    second.continue_()
    expect(state).to_have_class("ok")
    shown = page.locator("#receipt").inner_text()
    with page.expect_response(first.request.url):
        first.fulfill(json={})  # it would turn red
    page.evaluate(  # takes as long as what the page does with it
        """async () => {
          const own = document.querySelector('script[src*="playground.js"]').src;
          const { verifyReceipt } = await import(new URL("verify.js", own));
          await verifyReceipt({});
        }"""
    )
    expect(state).to_have_class("ok")
    assert page.locator("#receipt").inner_text() == shown


def test_a_key_expires_at_the_end_of_a_day_of_its_owner(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url, timezone_id="Pacific/Auckland")  # 13 hours before UTC
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    page.goto("/keys")
    page.get_by_role("button", name="Create key").first.click()
    page.locator("#create").get_by_label("Name").fill("until the 15th")
    page.locator("#create").get_by_label("Expires").fill("2030-01-15")
    with page.expect_request("**/v1/account/keys") as asked:
        page.locator("#create").get_by_role("button", name="Create").click()
    body: Any = asked.value.post_data_json
    assert body["expires_at"] == "2030-01-15T10:59:59.000Z"
    expect(page.locator("#secret-text")).to_contain_text("sk-pnv-")


def test_figures_are_read_again_and_leave_open_what_is_open(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    page.goto("/dashboard")
    expect(page.locator("#live")).to_have_text("Live")
    parts = page.locator("[data-figures]")
    opened = parts.locator("details").first
    opened.evaluate("(one) => { one.open = true; }")
    parts.first.evaluate("(part) => { part.dataset.old = ''; }")
    with page.expect_response("**/dashboard/figures**") as read:
        seeded.box.chat(MARKUP, model=FAKE, max_tokens=3)
    assert read.value.ok
    expect(page.locator("[data-figures][data-old]")).to_have_count(0)
    expect(opened).to_have_attribute("open", "")

    # While somebody is at the figures, they stay.
    parts.first.evaluate("(part) => { part.dataset.old = ''; }")
    opened.locator("summary").focus()
    rows = page.get_by_label("Finished lately").locator("tbody tr")
    before = rows.count()
    seeded.box.chat(MARKUP, model=FAKE, max_tokens=3)
    expect(rows).to_have_count(before + 1)
    expect(opened.locator("summary")).to_be_focused()
    expect(page.locator("[data-figures][data-old]")).to_have_count(1)


# -- what pages change -----------------------------------------------------------------------------


def test_default_parameters_of_a_model_are_set_and_reset(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    window.allow("status of 422")
    page.goto(f"/admin/models/show?model={SCRIPTED}")
    page.get_by_role("button", name="Change").click()
    dialog = page.locator("#settings-dialog")
    dialog.get_by_label("Temperature").fill("0.3")
    dialog.get_by_label("Context, tokens").fill("2048")
    dialog.get_by_label("Stays loaded when idle").fill("soon")
    dialog.get_by_role("button", name="Save").click()
    field = dialog.locator(".field", has=page.get_by_label("Stays loaded when idle"))
    expect(field.locator(".error")).to_contain_text("not a duration")
    dialog.get_by_label("Stays loaded when idle").fill("")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_text("set here", exact=True)).to_have_count(2)
    shown = seeded.box.http("POST", "/v1/admin/models/show", json={"model": SCRIPTED}).json()
    assert shown["overrides"] == {"context": 2048, "sampling": {"temperature": 0.3}}
    page.get_by_role("button", name="Change").click()  # it holds what was set
    expect(dialog.get_by_label("Temperature")).to_have_value("0.3")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("dialog").get_by_role("button", name="Reset").click()
    expect(page.get_by_text("set here", exact=True)).to_have_count(0)


def test_what_the_hub_finds_is_text_and_is_pulled_by_its_name(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    found = {
        "name": f"hf.co/someone/{RIGHT_TO_LEFT}", "downloads": 1200, "likes": 7,
        "parameters": 1_100_000_000, "context": 2048, "architecture": MARKUP, "license": MARKUP,
        "gated": True, "served": False,
    }  # fmt: skip
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    asked: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(json={"data": [found], "hub": "hub.example"})

    page.route("**/v1/admin/models/hub?*", answer)
    page.goto("/admin/models?q=llama")
    expect(page.get_by_role("searchbox")).to_have_value("llama")
    assert not asked
    page.get_by_role("button", name="Search huggingface.co").click()
    row = page.locator("#hub tbody tr")
    expect(row).to_contain_text(MARKUP)
    expect(row).to_contain_text("1.1 B")
    assert len(asked) == 1 and asked[0].endswith("?q=llama")
    look_at(page, "/admin/models/hub")
    row.get_by_role("button").click()
    expect(page.locator("#pull-dialog").get_by_label("Model", exact=True)).to_have_value(
        str(found["name"])
    )


def test_a_key_of_one_s_own_is_held_to_models_scopes_and_a_day(
    seeded: SeededBox, open_window: OpenWindow
) -> None:
    window = open_window(seeded.box.url)
    window.use_cookies(seeded.cookies["admin"])
    page = window.page
    page.goto("/keys")
    page.get_by_role("button", name="Create key").first.click()
    dialog = page.locator("#create")
    dialog.get_by_label("Name", exact=True).fill("narrow")
    dialog.get_by_label("usage", exact=True).uncheck()
    dialog.get_by_label("Models").fill(f"{FAKE}, scripted:*")
    look_at(page, "/keys/create")
    dialog.get_by_role("button", name="Create").click()
    expect(page.locator("#secret-text")).to_contain_text("sk-pnv-")
    with page_loaded(page):
        page.keyboard.press("Escape")
    row = page.get_by_role("row", name="narrow")
    expect(row).to_contain_text("inference, receipts")
    expect(row).to_contain_text(f"only {FAKE}, scripted:*")
    row.get_by_role("button", name="Edit").click()
    dialog = page.locator("#edit")
    expect(dialog.get_by_label("usage", exact=True)).not_to_be_checked()
    dialog.get_by_label("Models").fill("")
    dialog.get_by_label("local-only").check()
    dialog.get_by_label("Expires").fill("2099-12-31")
    with page_loaded(page):
        dialog.get_by_role("button", name="Save").click()
    expect(row).to_contain_text("local-only")
    expect(row).to_contain_text("2099")
    expect(row).not_to_contain_text("only fake")
