"""The chat in a browser: what it remembers, what survives a reload, and its use without a mouse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.browser.conftest import OpenWindow
from tests.support.browser import Window, log_in, log_out, page_loaded
from tests.support.fake_model import FAKE
from tests.support.pages import logged_in, make_account
from tests.support.process_box import UNDRAFTED, Box, StartBox
from tests.support.tiny_vision import image, put

SLOW = "slow:1"  # 20 ms a token, without an end
CLEVER = "clever:1"
SEES = "tiny:latest"
TITLED = "How tall is a giraffe in Kenya?"
TITLE = "Giraffe height in Kenya"
SCRIPT = [
    {"when": ["You name conversations", TITLED], "say": TITLE},
    {"when": ["You name conversations"], "say": "?"},
    {"when": ["colour is teal", "Which colour do I like?"], "say": "You like **teal**."},
    {"when": ["Which colour do I like?"], "say": "I do not know."},
    {"when": [], "say": "Noted.\n\n```python\nprint(1)\n```\n"},
]


@pytest.fixture(scope="module")
def box(module_box: StartBox, tmp_path_factory: pytest.TempPathFactory) -> Box:
    script = tmp_path_factory.mktemp("script") / "script.json"
    script.write_text(json.dumps(SCRIPT))
    folder = tmp_path_factory.mktemp("models")
    put(folder)  # the one that sees
    models = {FAKE: "fake:1", SLOW: "fake:20", CLEVER: f"fake:{script}"}
    options = [part for name, path in models.items() for part in ("--model", f"{name}={path}")]
    config = f'models_dir = "{folder}"\n{UNDRAFTED}context = 1024\nkv_tokens = 2048\n'
    return module_box(*options, config=config)


@pytest.fixture
def window(box: Box, open_window: OpenWindow, request: pytest.FixtureRequest) -> Window:
    """Logged in to an account of the test's own."""
    name = request.node.name.removeprefix("test_")[:60].replace("_", "-")
    with ThreadPoolExecutor(1) as other_thread:  # it runs a loop, and the browser's runs here
        other_thread.submit(make_account, box.home, name).result()
    window = open_window(box.url)
    with logged_in(box.url, name) as session:
        window.use_cookies(dict(session.cookies))
    return window


def new_chat(page: Page, model: str) -> None:
    page.goto("/chat")
    page.get_by_test_id("model").select_option(model)


def say(page: Page, text: str) -> Locator:
    """Sends a message; the answer, which may not have ended."""
    before = page.locator(".message.assistant").count()
    page.get_by_test_id("message-text").fill(text)
    page.get_by_test_id("message-text").press("Enter")
    answer = page.locator(".message.assistant").nth(before)
    expect(answer).to_be_visible()
    return answer


def held_requests(page: Page, pattern: str) -> Iterator[Route]:
    """From now on requests to such addresses wait; each of them, for `continue_()`."""
    held: list[Route] = []
    page.route(pattern, lambda route: held.append(route))

    def each() -> Iterator[Route]:
        while True:
            while not held:
                page.wait_for_timeout(20)
            yield held.pop(0)

    return each()


def complete(answer: Locator) -> Locator:
    expect(answer).to_have_attribute("data-status", "complete")
    return answer


def test_a_second_session_knows_a_fact_of_the_first(
    window: Window, open_window: OpenWindow
) -> None:
    page = window.page
    new_chat(page, CLEVER)
    complete(say(page, "Remember that my favourite colour is teal."))
    expect(page.get_by_test_id("remembered")).to_be_visible()
    log_out(window)

    second = open_window(window.url)
    page = second.page
    log_in(second, "a-second-session-knows-a-fact-of-the-first", to="/chat")
    page.get_by_test_id("model").select_option(CLEVER)
    answer = complete(say(page, "Which colour do I like?"))
    expect(answer.locator("strong")).to_have_text("teal")
    answer.get_by_test_id("memories-used").locator("summary").click()
    expect(answer.get_by_test_id("memories-used")).to_contain_text("teal")

    page.goto("/memories")
    memory = page.get_by_test_id("memory-list").get_by_role("listitem").filter(has_text="teal")
    expect(memory).to_have_count(1)


def test_an_answer_goes_on_while_the_page_is_loaded_again(window: Window) -> None:
    page = window.page
    new_chat(page, SLOW)
    answer = say(page, "Count.")
    expect(answer.locator(".md")).to_contain_text("quick brown fox")
    before = answer.locator(".md").inner_text()
    page.reload()
    again = page.locator(".message.assistant")
    expect(again).to_have_attribute("data-status", "running")
    expect(again.locator(".md")).to_contain_text(before[:20])
    expect(again.locator(".md")).to_contain_text(re.compile("(.*lazy dog){4}", re.DOTALL))
    page.keyboard.press("Escape")
    expect(again).to_have_attribute("data-status", "stopped")
    text = again.locator(".md").inner_text()
    page.reload()
    expect(page.locator(".message.assistant .md")).to_have_text(text)


def test_questions_are_edited_and_answered_again_in_branches(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    complete(say(page, "Which colour do I like?"))
    question = page.locator(".message.user")
    question.get_by_test_id("edit").click()
    question.get_by_role("textbox").fill("Something else.")
    question.get_by_test_id("send-edit").click()
    complete(page.locator(".message.assistant"))
    expect(page.locator(".message.user .branches")).to_contain_text("2/2")
    page.locator(".message.assistant").get_by_test_id("regenerate").click()
    expect(page.locator(".message.assistant .branches")).to_contain_text("2/2")
    complete(page.locator(".message.assistant"))
    with page.expect_response(re.compile("/v1/conversations/")) as noted:
        page.locator(".message.user").get_by_role("button", name="Previous version").click()
    assert noted.value.ok
    expect(page.locator(".message.user .said")).to_have_text("Which colour do I like?")
    page.reload()  # the box knows which branch is shown
    expect(page.locator(".message.user .said")).to_have_text("Which colour do I like?")


def test_nothing_else_is_asked_while_an_answer_is_written(window: Window) -> None:
    page = window.page
    new_chat(page, SLOW)
    answer = say(page, "Count.")
    page.keyboard.press("Escape")
    expect(answer).to_have_attribute("data-status", "stopped")
    question = page.locator(".message.user")
    question.get_by_test_id("edit").click()
    question.get_by_role("textbox").fill("Go on.")
    question.get_by_test_id("send-edit").click()
    expect(answer.locator(".md")).to_contain_text("quick brown fox")
    expect(answer).to_have_attribute("data-status", "running")
    buttons = (
        question.get_by_role("button", name="Previous version"),
        question.get_by_test_id("edit"),
    )
    for button in buttons:
        expect(button).to_be_disabled()
    page.keyboard.press("Escape")
    expect(answer).to_have_attribute("data-status", "stopped")
    for button in (*buttons, answer.get_by_test_id("regenerate")):
        expect(button).to_be_enabled()
    expect(question.get_by_role("button", name="Next version")).to_be_disabled()


def test_what_turns_a_text_around_is_written_out(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    complete(say(page, "invoice \u202egnp.exe\u202c, na\u00efve"))
    said = page.locator(".message.user .said")
    expect(said).to_have_text("invoice U+202Egnp.exeU+202C, na\u00efve")
    page.reload()
    expect(said.locator(".invisible").first).to_have_attribute("title", "Right-To-Left Override")


def test_a_recovery_key_is_offered_in_the_first_empty_chat(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    offer = page.get_by_test_id("recovery-offer")
    expect(offer).to_be_visible()
    with page_loaded(page):
        offer.get_by_role("link", name="Make one").click()
    expect(page.locator("#make-recovery-key")).to_be_visible()
    page.keyboard.press("Escape")
    new_chat(page, CLEVER)
    expect(offer).to_be_visible()  # it was not answered
    with page.expect_response("**/recovery-key/decline") as declined:
        complete(say(page, "Hello"))
    assert declined.value.ok
    page.goto("/chat")
    expect(page.get_by_test_id("welcome")).to_be_visible()
    expect(offer).to_have_count(0)
    page.goto("/account#make-recovery-key")
    page.get_by_role("dialog").get_by_role("button", name="Make it").click()
    expect(page.locator("#recovery-key-text")).to_contain_text("-")


def test_the_model_names_a_conversation(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    complete(say(page, TITLED))
    expect(page.get_by_test_id("title")).to_have_text(TITLE)
    expect(page.locator("a.conversation")).to_have_text(TITLE)


# Whether something other than one colour is drawn, as of an image with a stripe.
DRAWN = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const at = (x) => data.slice(4 * x, 4 * x + 3).join();
  return [canvas.width, canvas.height, at(2), at(canvas.width - 3)];
}"""


def test_an_image_reaches_the_model_and_stays(window: Window) -> None:
    page = window.page
    page.goto("/chat")
    page.get_by_test_id("model").select_option(SEES)
    file: Any = {"name": "red.png", "mimeType": "image/png", "buffer": image(red=200)}
    page.get_by_test_id("files").set_input_files(file)
    expect(page.locator("#attachments canvas")).to_be_visible()
    page.evaluate('localStorage.setItem("pinaivu-chat-parameters", \'{"max_tokens": 4}\')')
    with page.expect_response("**/messages") as loaded:
        complete(say(page, "What is it?"))
        page.reload()
    prompt_tokens = loaded.value.json()["data"][1]["prompt_tokens"]
    assert prompt_tokens > 64  # so many of the image
    shown = page.locator(".message.user canvas")
    expect(shown).to_be_visible()
    width, height, stripe, colour = shown.evaluate(DRAWN)
    assert (width, height) == (80, 60) and min(map(int, stripe.split(","))) > 200
    red, green, blue = map(int, colour.split(","))
    assert red > 150 > 60 > max(green, blue)


def test_a_conversation_is_kept_without_a_mouse(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    expect(page.get_by_test_id("message-text")).to_be_focused()
    page.keyboard.type("First line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    complete(page.locator(".message.assistant"))
    expect(page.get_by_test_id("message-text")).to_be_focused()

    row = page.get_by_test_id("conversation")
    options = row.locator("summary")
    options.focus()
    page.keyboard.press("Enter")
    expect(row.get_by_test_id("rename")).to_be_visible()
    page.keyboard.press("Escape")
    expect(row.get_by_test_id("rename")).to_be_hidden()
    expect(options).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(row.get_by_test_id("rename")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("new-title")).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("Renamed by keys")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("title")).to_have_text("Renamed by keys")

    page.get_by_test_id("open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("settings")).to_be_hidden()
    expect(page.get_by_test_id("open-settings")).to_be_focused()


def test_conversations_are_found_exported_imported_and_deleted(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    complete(say(page, "About walruses"))
    page.get_by_test_id("new-chat").click()
    complete(say(page, "About pelicans"))
    rows = page.get_by_test_id("conversation")
    expect(rows).to_have_count(2)
    page.get_by_test_id("search").fill("walruses")
    expect(rows).to_have_count(1)
    rows.locator("summary").click()
    with page.expect_download() as download:
        rows.get_by_role("link", name="Export as JSON").click()
    exported = download.value.path().read_bytes()
    rows.locator("summary").click()
    rows.get_by_test_id("delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(0)
    page.get_by_test_id("search").fill("")
    expect(rows).to_have_count(1)
    file: Any = {"name": "chat.json", "mimeType": "application/json", "buffer": exported}
    page.locator("#import-file").set_input_files(file)
    expect(rows).to_have_count(2)

    rows.first.locator("summary").click()
    with page.expect_download() as download:
        rows.first.get_by_role("link", name="Export as Markdown").click()
    exported = download.value.path().read_bytes()
    file = {"name": "chat.md", "mimeType": "text/markdown", "buffer": exported}
    page.locator("#import-file").set_input_files(file)
    expect(rows).to_have_count(3)
    expect(page.locator("#toasts")).to_contain_text("Markdown holds one branch")
    window.allow("status of 422")
    file = {"name": "other.md", "mimeType": "text/markdown", "buffer": b"# No chat"}
    page.locator("#import-file").set_input_files(file)
    expect(page.get_by_test_id("notice")).to_contain_text("other.md was not imported")


def test_a_phone_has_the_list_in_a_drawer(window: Window) -> None:
    page = window.page
    page.set_viewport_size({"width": 360, "height": 700})
    new_chat(page, CLEVER)
    complete(say(page, "Hello"))
    link = page.locator("a.conversation")
    expect(link).not_to_be_in_viewport()
    page.get_by_test_id("open-list").click()
    expect(link).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(link).not_to_be_in_viewport()
    expect(page.get_by_test_id("open-list")).to_be_focused()


def test_a_text_file_goes_with_a_message(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    file: Any = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"my colour is teal"}
    page.get_by_test_id("files").set_input_files(file)
    expect(page.locator("#attachments")).to_contain_text("notes.txt")
    answer = complete(say(page, "Which colour do I like?"))
    expect(answer.locator("strong")).to_have_text("teal")
    expect(page.locator(".message.user")).to_contain_text("notes.txt")


def test_earlier_answers_keep_their_markdown_when_another_message_is_sent(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    first = complete(say(page, "Hello"))
    expect(first.locator(".code")).to_have_count(1)
    html = first.locator(".done").inner_html()
    complete(say(page, "Which colour do I like?"))
    assert first.locator(".done").inner_html() == html


def test_an_answer_that_has_not_begun_is_stopped_when_it_does(window: Window) -> None:
    page = window.page
    new_chat(page, SLOW)
    held = held_requests(page, "**/answers")
    page.get_by_test_id("message-text").fill("Count.")
    page.get_by_test_id("message-text").press("Enter")
    route = next(held)
    page.get_by_test_id("stop").click()
    route.continue_()
    expect(page.locator(".message.assistant")).to_have_attribute("data-status", "stopped")
    expect(page.get_by_test_id("send")).to_be_visible()


def test_the_conversation_that_was_chosen_last_is_shown(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    for text in ("About walruses", "About pelicans"):
        page.get_by_test_id("new-chat").click()
        complete(say(page, text))
    page.get_by_test_id("new-chat").click()
    rows, question = page.locator("a.conversation"), page.locator(".message.user .said")
    held = held_requests(page, "**/chat/*/messages")
    rows.filter(has_text="walruses").click()
    first = next(held)
    rows.filter(has_text="pelicans").click()
    second = next(held)
    with page.expect_response("**/chat/*/messages"):
        first.continue_()
    second.continue_()
    expect(question).to_have_text("About pelicans")
    expect(page.get_by_test_id("notice")).to_be_hidden()
    expect(page.get_by_test_id("title")).to_have_text("About pelicans")
    complete(say(page, "Hello"))
    expect(question).to_have_text(["About pelicans", "Hello"])


def test_a_lost_connection_leaves_the_page_usable_and_is_tried_again(window: Window) -> None:
    page = window.page
    window.allow("429", "net::ERR_FAILED")
    new_chat(page, CLEVER)
    page.route("**/chat/*/answers/*", lambda route: route.fulfill(status=429, body="{}"))
    page.route("**/chat/*/messages", lambda route: route.abort("failed"))
    page.get_by_test_id("message-text").fill("Which colour do I like?")
    page.get_by_test_id("message-text").press("Enter")
    expect(page.get_by_test_id("notice")).to_be_visible()
    expect(page.get_by_test_id("send")).to_be_visible()
    expect(page.get_by_test_id("message-text")).to_have_value("")  # it was sent
    page.unroute_all()
    page.get_by_test_id("again").click()
    answer = complete(page.locator(".message.assistant"))
    expect(answer.locator(".md")).to_contain_text("I do not know.")
    expect(page.locator(".message.user")).to_have_count(1)


def test_a_search_that_ends_at_its_limit_says_so(window: Window) -> None:
    page = window.page
    page.goto("/chat")
    expect(page.locator("#conversations")).to_contain_text("Your conversations will be here.")
    partial: dict[str, Any] = {"data": [], "next": "1.conv_a", "searched_all": False}
    page.route(re.compile("search=walrus$"), lambda route: route.fulfill(json=partial))
    page.get_by_test_id("search").fill("walrus")
    expect(page.locator("#conversations")).to_contain_text("have not been searched yet")
    page.get_by_role("button", name="Search older").click()
    expect(page.locator("#conversations")).to_contain_text("No conversation has these words.")


def test_everything_is_exported_from_the_chat(window: Window) -> None:
    page = window.page
    new_chat(page, CLEVER)
    complete(say(page, "About walruses"))
    with page.expect_download() as download:
        page.get_by_test_id("export-all").click()
    exported = json.loads(download.value.path().read_bytes())
    assert [one["title"] for one in exported["conversations"]] == ["About walruses"]
