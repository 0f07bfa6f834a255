"""Images over the APIs: a box with a tiny model that sees, and one that does not."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.chats import ask, conversation, files_with, messages
from tests.support.image_server import ImageServer, image_server
from tests.support.in_process_command import run_command
from tests.support.pages import logged_in, make_account
from tests.support.process_box import MODEL as BLIND
from tests.support.process_box import Box, StartBox
from tests.support.registry_server import registry_server
from tests.support.tiny_vision import encoded, image, put

SEES = "tiny:latest"
RED, GREEN, BLUE = image(red=200), image(green=200), image(blue=200)
CELLS = 64  # of one image

Json = dict[str, Any]


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    with image_server() as started:
        yield started


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, module_box: StartBox) -> Box:
    folder = tmp_path_factory.mktemp("models")
    put(folder)
    return module_box(
        config=f'models_dir = "{folder}"\n[server]\nimage_hosts = ["127.0.0.1"]\n'
        "[engine]\ncontext = 1024\nkv_tokens = 2048\n"
    )


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(data: bytes | str, **more: Any) -> Json:
    url = data if isinstance(data, str) else data_url(data)
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*parts: str | Json) -> Json:
    texts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return {"role": "user", "content": texts}


def chat(box: Box, *parts: str | Json, status: int = 200, **more: Any) -> Json:
    body = {"model": SEES, "messages": [user(*parts)], "max_tokens": 8, "temperature": 0, **more}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    found: Json = answer.json()
    return found


def said(answer: Json) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_an_answer_depends_on_the_image(here: Box) -> None:
    red, blue = chat(here, "What? ", part(RED)), chat(here, "What? ", part(BLUE))
    again = chat(here, "What? ", part(RED, detail="auto"), cache_prompt=False)
    assert said(red) == said(again) != said(blue)


def test_images_count_as_tokens(here: Box) -> None:
    without, one = chat(here, "What? "), chat(here, "What? ", part(RED))
    two = chat(here, "What? ", part(RED), part(BLUE))
    tokens = [answer["usage"]["prompt_tokens"] for answer in (without, one, two)]
    assert tokens == [tokens[0], tokens[0] + CELLS, tokens[0] + 2 * CELLS]
    body = {"model": SEES, "messages": [user("What? ", part(RED))]}
    counted = here.http("POST", "/v1/chat/completions/input_tokens", json=body).json()
    assert counted["input_tokens"] == tokens[1]
    cached = chat(here, "What? ", part(RED), " And now?")["usage"]
    assert cached["prompt_tokens_details"]["cached_tokens"] >= CELLS


def test_a_context_is_full_of_images(here: Box) -> None:
    many = [part(image(red=number)) for number in range(20)]
    error = chat(here, *many, "What?", status=400)["error"]
    assert error["code"] == "context_length_exceeded"


def test_a_limit_of_tokens_counts_images(here: Box) -> None:
    key = here.http("POST", "/v1/admin/keys", json={"policy": {"tpm": 60}}).json()["key"]
    body = {"model": SEES, "messages": [user(part(RED), "?")], "max_tokens": 8}
    refused = here.http("POST", "/v1/chat/completions", json=body, key=key)
    assert refused.status_code == 400 and "exceeds_key_limit" in refused.text
    body["messages"] = [user("?")]
    assert here.http("POST", "/v1/chat/completions", json=body, key=key).status_code == 200


def test_a_stream_has_images_too(here: Box) -> None:
    chunks = here.client.chat.completions.create(
        model=SEES, messages=[user("What? ", part(RED))], max_tokens=8, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == said(chat(here, "What? ", part(RED)))


def test_an_answer_about_an_image_outlives_its_engine(here: Box) -> None:
    asked = {"messages": [user("What? ", part(RED))], "max_tokens": 900, "temperature": 0}
    chunks = here.client.chat.completions.create(model=SEES, stream=True, **asked)
    text, before = "", 0
    for number, chunk in enumerate(chunks):
        if number == 3:
            (engine,) = (each for each in here.engines() if each["model"] == SEES)
            os.kill(engine["pid"], signal.SIGKILL)
            before = len(text)
        text += chunk.choices[0].delta.content or ""
    receipt = here.http("GET", f"/v1/receipts/{chunk.request_id}").json()
    assert len(json.loads(receipt["signed_receipt"])["proofs"]) == 2
    whole = here.client.chat.completions.create(model=SEES, **asked)
    # Of so many draws of random weights some are near ties, which rounding decides.
    assert whole.choices[0].message.content.startswith(text[: before + 100])


# -- the other APIs --------------------------------------------------------------------------------


def test_all_apis_see_the_same(here: Box) -> None:
    expected = said(chat(here, part(RED), "What?"))
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(RED).decode()}
    image_block = {"type": "image", "source": source}
    text_block = {"type": "text", "text": "What?"}
    common = {"model": SEES, "temperature": 0}
    anthropic = here.http(
        "POST",
        "/v1/messages",
        json={**common, "max_tokens": 8,
              "messages": [{"role": "user", "content": [image_block, text_block]}]},
    ).json()  # fmt: skip
    assert anthropic["content"][0]["text"] == expected
    items = [
        {"type": "input_image", "image_url": data_url(RED), "detail": "auto"},
        {"type": "input_text", "text": "What?"},
    ]
    response = here.http(
        "POST",
        "/v1/responses",
        json={**common, "max_output_tokens": 8, "input": [{"role": "user", "content": items}]},
    ).json()
    assert response["output"][0]["content"][0]["text"] == expected
    options = {"temperature": 0, "num_predict": 8}
    message = {"role": "user", "content": "What?", "images": [base64.b64encode(RED).decode()]}
    ollama: Json = {"model": SEES, "stream": False, "options": options}
    chatted = here.http("POST", "/api/chat", json={**ollama, "messages": [message]}).json()
    assert chatted["message"]["content"] == expected
    prompt = {"prompt": "What?", "images": message["images"]}
    assert here.http("POST", "/api/generate", json={**ollama, **prompt}).json()["response"] == (
        expected
    )


def test_a_stored_conversation_keeps_its_images(here: Box) -> None:
    parts = [{"type": "input_image", "image_url": data_url(RED)}]
    first = here.http(
        "POST",
        "/v1/responses",
        json={"model": SEES, "input": [{"role": "user", "content": parts}], "max_output_tokens": 4},
    ).json()
    more = {"model": SEES, "input": "And?", "previous_response_id": first["id"]}
    second = here.http("POST", "/v1/responses", json={**more, "max_output_tokens": 4}).json()
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= CELLS
    stored = here.http("GET", f"/v1/responses/{first['id']}/input_items").json()["data"][0]
    assert stored["content"][0]["image_url"] == data_url(RED)


def test_a_chat_of_the_page_shows_its_images_to_the_model_and_seals_them(here: Box) -> None:
    # A colour of its own: what others store in this box as they sent it is not sealed.
    make_account(here.home, "ada")
    with logged_in(here.url) as ada:

        def answered(*images: bytes) -> tuple[str, Json]:
            chat = conversation(ada, model=SEES, memory=False)
            urls = [data_url(one) for one in images]
            return chat, ask(ada, chat, "What?", images=urls, temperature=0)

        (_, none), (_, blue), (chat, red) = answered(), answered(BLUE), answered(GREEN)
        assert red["prompt_tokens"] == blue["prompt_tokens"] == none["prompt_tokens"] + CELLS
        assert red["content"] != blue["content"]
        assert messages(ada, chat)[0]["images"] == [data_url(GREEN)]
        again = ask(ada, chat, "And now?", temperature=0)  # it is still before the model
        assert again["prompt_tokens"] > red["prompt_tokens"]

        exported = ada.get(f"/v1/conversations/{chat}/export").content
        ada.delete(f"/v1/conversations/{chat}").raise_for_status()
        ada.post("/v1/conversations/import", content=exported).raise_for_status()
        taken = ada.get("/v1/conversations").json()["data"][0]["id"]
        page = ada.get(f"/chat/{taken}/messages").json()["data"]
        assert page[0]["images"] == [data_url(GREEN)] and page[1]["html"]
    assert files_with(here.home, base64.b64encode(GREEN).decode()[-60:]) == []
    assert not [
        file for file in here.home.rglob("*") if file.is_file() and GREEN in file.read_bytes()
    ]


def test_the_result_of_a_tool_may_be_an_image(here: Box) -> None:
    call = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(RED).decode()}
    result = {
        "type": "tool_result",
        "tool_use_id": "c1",
        "content": [{"type": "image", "source": source}],
    }
    history = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    body = {"model": SEES, "messages": history}
    tokens = here.http("POST", "/v1/messages/count_tokens", json=body).json()["input_tokens"]
    result["content"] = []
    fewer = here.http("POST", "/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert tokens == fewer + CELLS


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [user("What?", part(RED))]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": data_url(RED)}]}]}),
        ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}]}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "?", "images": ["aGk="]}]}),
        ("/api/generate", {"prompt": "?", "images": ["aGk="]}),
    ],
)  # fmt: skip
def test_a_model_that_sees_nothing_names_one_that_does(here: Box, path: str, body: Json) -> None:
    answer = here.http("POST", path, json={**body, "model": BLIND})
    assert answer.status_code == 422
    assert f"the model {BLIND} sees no images: use {SEES}" in answer.text


def test_a_box_without_such_a_model_says_so(box: Box) -> None:
    body = {"model": BLIND, "messages": [user(part(RED))]}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 422
    assert "sees no images: send text only" in answer.json()["error"]["message"]


def huge() -> bytes:
    """A PNG file that says that it has 400 million pixels, in 40 kB."""
    size = 20_000
    lines = zlib.compress(bytes(1 + size // 8) * size, 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">2I5B", size, size, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"hello", "cannot be read"),
        (RED[: len(RED) // 2], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "cannot be read"),
        (RED.replace(b"IDAT", b"IDOT"), "cannot be read"),
        (b"GIF89a" + b"\xff" * 60, "cannot be read"),
        (b"RIFF\xff\xff\xff\x7fWEBPVP8 " + b"\0" * 60, "cannot be read"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 400, "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (huge(), "20000 x 20000 pixels"),
        (image(size=(2000, 2)), "64 times as long"),
    ],
)  # fmt: skip
def test_hostile_files_are_a_sentence(here: Box, data: bytes, words: str) -> None:
    error = chat(here, part(data), "What?", status=400)["error"]
    assert words in error["message"] and error["param"] == "messages"
    assert said(chat(here, part(RED), "What?"))  # the engine is well


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:image/png;base64,@@@", "data:;base64,YWJ", "x", ""]
)
def test_a_url_that_is_none_is_refused(here: Box, url: str) -> None:
    error = chat(here, part(url), "What?", status=422)["error"]
    assert error["param"].startswith("messages.0.content.0.image_url")


def test_detail_has_no_effect_and_says_so(here: Box) -> None:
    assert chat(here, part(RED, detail="high"), "?")["ignored_parameters"] == [
        "messages.content.image_url.detail"
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_these_kinds_are_seen(here: Box, kind: str) -> None:
    made = Image.new("RGB", (64, 64), (200, 0, 0))
    answer = chat(here, part(encoded(made, kind)), "What?")
    assert answer["usage"]["prompt_tokens"] > CELLS


@pytest.mark.parametrize("size", [(1, 1), (64, 1), (3, 100), (5000, 100)])
def test_images_of_all_sizes_are_seen(here: Box, size: tuple[int, int]) -> None:
    made = encoded(Image.new("RGB", size, (200, 0, 0)), "PNG")
    assert chat(here, part(made), "What?")["usage"]["prompt_tokens"] > CELLS


def test_of_an_animation_the_first_image_is_seen(here: Box) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    moving = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert said(chat(here, part(moving), "What?")) == (
        said(chat(here, part(encoded(red, "GIF")), "What?"))
    )


def test_a_photo_is_seen_upright(here: Box) -> None:
    made = Image.open(io.BytesIO(RED)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned to the left
    lying = encoded(made.transpose(Image.Transpose.ROTATE_270), "PNG", exif=exif)
    assert said(chat(here, part(lying), "What?")) == said(chat(here, part(RED), "What?"))


def test_a_large_body_is_a_few_values(here: Box) -> None:
    """A photo of some megabytes passes the limits of what is decoded."""
    noise = Image.effect_noise((1800, 1800), 90).convert("RGB")
    photo = encoded(noise, "PNG")
    assert len(photo) > 3_000_000
    assert chat(here, part(photo), "What?")["usage"]["prompt_tokens"] > CELLS


def test_an_image_by_url_is_fetched_where_that_is_allowed(here: Box, server: ImageServer) -> None:
    fetched = chat(here, part(server.url("/red.png")), "What?")
    assert said(fetched) == said(chat(here, part(RED), "What?"))
    other = chat(here, part("https://example.com/x.png"), "What?", status=422)["error"]
    assert "example.com" in other["message"] and "image_hosts" in other["message"]
    missing = chat(here, part(server.url("/missing")), "What?", status=422)["error"]
    assert "404" in missing["message"]


# -- receipts, and what says that a model sees -----------------------------------------------------


def test_a_receipt_commits_to_the_image(here: Box, tmp_path: Path) -> None:
    body = {"model": SEES, "messages": [user("What? ", part(RED))], "max_tokens": 4}
    answer = here.http("POST", "/v1/chat/completions", json=body).json()
    receipt = here.http("GET", f"/v1/receipts/{answer['request_id']}").json()
    files = {"receipt": receipt, "request": body, "answer": answer}
    paths = {}
    for name, content in files.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(content))

    def verified(request: Json) -> bool:
        paths["request"].write_text(json.dumps(request))
        checked = run_command(
            "receipts", "verify", str(paths["receipt"]), "--request", str(paths["request"]),
            "--answer", str(paths["answer"]), home=tmp_path / "none", check=False,
        )  # fmt: skip
        return checked.returncode == 0

    assert verified(body)
    assert not verified({**body, "messages": [user("What? ", part(BLUE))]})
    assert not verified({**body, "messages": [user("What? ")]})
    nonce = bytes.fromhex(receipt["opening"]["prompt"]["nonce"])
    parts = [
        {"text": "What? ", "type": "text"},
        {"sha256": hashlib.sha256(RED).hexdigest(), "type": "image"},
    ]
    asked = {"messages": [{"content": parts, "role": "user"}], "stop": []}
    text = json.dumps(asked, separators=(",", ":"), sort_keys=True).encode()
    tokens = bytes.fromhex(receipt["opening"]["prompt"]["tokens_sha256"])
    digest = hashlib.sha256(
        b"pinaivu/commitment/v1\n" + nonce + hashlib.sha256(text).digest() + tokens
    ).hexdigest()
    assert json.loads(receipt["signed_receipt"])["prompt_commitment"] == digest


def test_models_say_that_they_see(here: Box) -> None:
    shown = {
        model: here.http("POST", "/api/show", json={"model": model}).json()["capabilities"]
        for model in (SEES, BLIND)
    }
    assert "vision" in shown[SEES] and "vision" not in shown[BLIND]
    described = here.http("POST", "/v1/admin/models/show", json={"model": SEES}).json()
    assert described["projector"].endswith("mmproj-tiny.gguf")
    listed = {each["id"]: each for each in here.http("GET", "/v1/models").json()["data"]}
    assert listed[SEES]["architecture"]["input_modalities"] == ["text", "image"]
    assert listed[BLIND]["architecture"]["input_modalities"] == ["text"]


def test_a_model_with_a_projector_is_pulled_and_sees(
    new_box: Callable[..., Box], tmp_path: Path
) -> None:
    files = put(tmp_path / "published")
    weights, projector = files.model.read_bytes(), files.projector.read_bytes()
    with registry_server() as registry:
        registry.add_ollama("library/eye:1b", weights, projector=projector)
        box = new_box(config=f'[registry]\nollama = "{registry.url}"\n')
        lines = box.http("POST", "/v1/admin/models/pull", json={"model": "eye:1b"}).text
        assert json.loads(lines.splitlines()[-1])["state"] == "done", lines
    body = {"model": "eye:1b", "messages": [user("What? ", part(RED))], "max_tokens": 4}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text + box.errors
    assert answer.json()["usage"]["prompt_tokens"] > CELLS
    listed = box.http("GET", "/v1/admin/models").json()
    assert not listed["not_served"]
    deleted = box.http("POST", "/v1/admin/models/delete", json={"model": "eye:1b"})
    assert deleted.status_code == 200, deleted.text
    assert not list((box.home / "models").rglob("*eye*"))
