"""Ollama's API: what its clients send is answered as they expect, metered and signed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.process_box import MODEL, Box, wait_until

FAKE = "fake:1"
USER = {"role": "user", "content": "Say hello."}


def post(box: Box, path: str, status: int = 200, **body: Any) -> Any:
    done = box.http("POST", f"/api/{path}", json={"model": FAKE, "stream": False, **body})
    assert done.status_code == status, done.text
    return done.json()


def lines(box: Box, path: str, **body: Any) -> list[dict[str, Any]]:
    done = box.http("POST", f"/api/{path}", json={"model": FAKE, **body})
    assert done.status_code == 200, done.text
    assert done.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in done.text.splitlines()]


def test_a_chat_is_streamed_unless_it_is_not_wanted(fake_box: Box) -> None:
    options = {"num_predict": 12, "seed": 7}
    streamed = lines(fake_box, "chat", messages=[USER], options=options)
    whole = post(fake_box, "chat", messages=[USER], options=options)
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    assert all(line["message"]["role"] == "assistant" for line in streamed)
    text = "".join(line["message"]["content"] for line in streamed)
    assert text == whole["message"]["content"] != ""
    for last in (streamed[-1], whole):
        assert (last["done_reason"], last["eval_count"]) == ("length", 12)
        assert last["prompt_eval_count"] > 0
        spent = last["load_duration"] + last["prompt_eval_duration"] + last["eval_duration"]
        assert last["total_duration"] >= spent > last["prompt_eval_duration"] > 0


def test_an_answer_has_a_receipt(fake_box: Box) -> None:
    request_id = post(fake_box, "chat", messages=[USER], options={"num_predict": 2})["request_id"]
    assert fake_box.http("GET", f"/v1/receipts/{request_id}").json()["model"] == FAKE


def test_the_same_options_make_the_same_answer_as_at_openais(fake_box: Box) -> None:
    options = {"num_predict": 9, "seed": 3, "temperature": 0.7, "top_k": 5, "stop": ["zz"]}
    here = post(fake_box, "chat", messages=[USER], options=options)
    there = fake_box.chat(
        model=FAKE, messages=[USER], max_tokens=9, seed=3, temperature=0.7, top_k=5, stop="zz"
    ).json()
    assert here["message"]["content"] == there["choices"][0]["message"]["content"]
    assert here["prompt_eval_count"] == there["usage"]["prompt_tokens"]


@pytest.mark.parametrize("limit", [-1, -2])
def test_no_limit_is_until_the_model_ends(fake_box: Box, limit: int) -> None:
    options = {"num_predict": limit, "stop": ["."]}
    answer = post(fake_box, "chat", messages=[USER], options=options)
    assert answer["done_reason"] == "stop"


def test_a_prompt_is_a_message_or_is_read_as_it_is(fake_box: Box) -> None:
    options = {"num_predict": 3}
    raw = post(fake_box, "generate", prompt="abc", raw=True, options=options)
    assert raw["prompt_eval_count"] == 3  # the fake model's tokens are bytes
    message = post(fake_box, "generate", prompt="abc", options=options)
    chat = post(fake_box, "chat", messages=[{"role": "user", "content": "abc"}], options=options)
    assert message["prompt_eval_count"] == chat["prompt_eval_count"] > 3
    assert message["response"] == chat["message"]["content"]
    with_system = post(fake_box, "generate", prompt="abc", system="Be brief.", options=options)
    assert with_system["prompt_eval_count"] > message["prompt_eval_count"]
    streamed = lines(fake_box, "generate", prompt="abc", options=options)
    assert "".join(line["response"] for line in streamed) == message["response"]


def test_a_request_without_a_prompt_loads_the_model(fake_box: Box) -> None:
    for path in ("generate", "chat"):
        answer = post(fake_box, path)
        assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert FAKE in [model["name"] for model in fake_box.http("GET", "/api/ps").json()["models"]]


def loaded(box: Box) -> list[str]:
    return [model["name"] for model in box.http("GET", "/api/ps").json()["models"]]


@pytest.mark.parametrize("path", ["generate", "chat"])
def test_a_request_without_a_prompt_that_keeps_a_model_for_no_time_unloads_it(
    fake_box: Box, path: str
) -> None:
    post(fake_box, path, keep_alive="1h")
    assert FAKE in loaded(fake_box)
    answer = post(fake_box, path, keep_alive=0)
    assert (answer["done"], answer["done_reason"]) == (True, "unload")
    assert FAKE not in loaded(fake_box)
    assert post(fake_box, path, keep_alive="0")["done_reason"] == "unload"  # and loads nothing
    assert FAKE not in loaded(fake_box)


def test_a_key_unloads_for_itself_alone(fake_box: Box) -> None:
    body = {"account": "owner", "name": "plain"}
    plain = fake_box.http("POST", "/v1/admin/keys", json=body).json()["key"]

    def ask(keep_alive: object, key: str | None = None) -> None:
        body = {"model": FAKE, "stream": False, "keep_alive": keep_alive}
        done = fake_box.http("POST", "/api/generate", key=key, json=body)
        assert done.status_code == 200, done.text

    ask("1h")
    ask("1h", plain)
    ask(0, plain)
    post(fake_box, "generate", prompt="hi", options={"num_predict": 1}, keep_alive="1h")
    assert FAKE in loaded(fake_box)
    ask(0)
    assert FAKE not in loaded(fake_box)
    ask("1h", plain)
    ask(0, plain)
    wait_until(lambda: FAKE not in loaded(fake_box), "nobody else wants it")


def test_an_answer_keeps_to_a_schema(box: Box) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    answer = post(box, "chat", model=MODEL, messages=[USER], format=schema)
    assert list(json.loads(answer["message"]["content"])) == ["age"]
    answer = post(box, "generate", model=MODEL, prompt="An object.", format="json",
                  options={"num_predict": 2000, "seed": 1})  # fmt: skip
    assert isinstance(json.loads(answer["response"]), dict)


def test_a_call_comes_whole_and_its_result_goes_back(box: Box) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "sunny"},
    ]
    body: dict[str, Any] = {
        "model": MODEL,
        "tools": [tool],
        "options": {"num_predict": 40, "seed": 2},
    }
    answer = post(box, "chat", messages=messages, **body)
    assert answer["done"]
    for line in lines(box, "chat", messages=messages[:1], **body):
        for called in line["message"].get("tool_calls", []):
            assert called["function"]["name"] == "weather"
            assert called["function"]["arguments"]["city"] in ("Rome", "Oslo")


def test_texts_have_vectors_of_the_length_that_is_asked_for(box: Box) -> None:
    answer = post(box, "embed", model=MODEL, input=["a cat", "a dog"], dimensions=8)
    first, second = answer["embeddings"]
    assert len(first) == len(second) == 8 and first != second
    alone = post(box, "embed", model=MODEL, input="a cat", dimensions=8)
    assert alone["embeddings"][0] == pytest.approx(first, abs=1e-3)
    old = post(box, "embeddings", model=MODEL, prompt="a cat")
    assert len(old["embedding"]) > 8


def test_the_models_are_listed_and_described(box: Box) -> None:
    post(box, "embed", model=MODEL, input="a cat")  # a file's digest is known once it was used
    (model,) = [
        model for model in box.http("GET", "/api/tags").json()["models"] if model["name"] == MODEL
    ]
    assert model["size"] > 50_000_000 and len(model["digest"]) == 64
    details = model["details"]
    assert (details["format"], details["quantization_level"]) == ("gguf", "Q8_0")
    assert details["parameter_size"].startswith("13") and details["parameter_size"].endswith("M")
    shown = post(box, "show", model=MODEL)
    family = shown["details"]["family"]
    assert shown["model_info"]["general.architecture"] == family
    assert shown["model_info"][f"{family}.context_length"] > 0
    named = box.http("POST", "/api/show", json={"name": MODEL}).json()
    assert named["details"] == shown["details"]
    assert box.http("GET", "/api/version", key="").json()["version"]


@pytest.mark.parametrize(
    "path, status, body, words",
    [
        ("chat", 404, {"model": "none:1", "messages": [USER]}, "none:1"),
        ("show", 404, {"model": "none:1"}, "none:1"),
        ("chat", 422, {"messages": [{"role": "alien", "content": ""}]}, "alien"),
        ("chat", 422, {"messages": [USER], "options": {"temperature": "hot"}}, "float"),
        ("chat", 422, {"messages": [{**USER, "images": ["aGk="]}]}, "images"),
        ("generate", 422, {"prompt": "x", "images": ["aGk="]}, "images"),
        ("chat", 422, {"messages": [{"role": "tool", "content": "1"}]}, "no call"),
        ("embed", 422, {}, "field required"),
    ],
)
def test_an_error_is_one_sentence(
    fake_box: Box, path: str, status: int, body: dict[str, Any], words: str
) -> None:
    error = post(fake_box, path, status, **body)["error"]
    assert isinstance(error, str) and words in error


def test_a_key_is_needed(fake_box: Box) -> None:
    for path in ("tags", "ps"):
        done = fake_box.http("GET", f"/api/{path}", key="")
        assert done.status_code == 401 and "key is missing" in done.json()["error"]
