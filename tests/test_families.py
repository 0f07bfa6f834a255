"""Tools and thoughts with the real engine under the chat templates of other families of models.

Their files cannot be had where tests run: here the default model's weights read and write as each
family's template says.  What is forced by a grammar is then right whatever the weights know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from pinaivu_box.models import bundled
from tests.support.gguf_files import HOSTILE_TEMPLATE, with_template
from tests.support.process_box import Box

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
FAMILIES = [path.stem for path in TEMPLATES]
BROKEN_TEMPLATE = b"{% for message in messages %}{{ message.content }}"  # without an end
CONFIG = "[engine]\ncontext = 1024\nkv_tokens = 2048\nmax_sequences = 2\nmax_queue = 8\n"

WEATHER: dict[str, Any] = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"enum": ["celsius", "kelvin"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "unit", "days"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [{"type": "function", "function": one} for one in (WEATHER, CLOCK)]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box with a model for each template; 140 MB each, of which most are read from the cache."""
    folder = tmp_path_factory.mktemp("families")
    location = bundled.find()
    assert location and location.offset == 0
    source = location.path.read_bytes()
    models = []
    for path in TEMPLATES:
        file = folder / f"{path.stem}.gguf"
        file.write_bytes(with_template(source, path.read_bytes()))
        models.append(f"--model={path.stem}={file}")
    file = folder / "hostile.gguf"
    file.write_bytes(with_template(source, HOSTILE_TEMPLATE.encode()))
    models.append(f"--model=hostile={file}")
    file = folder / "broken.gguf"
    file.write_bytes(with_template(source, BROKEN_TEMPLATE))
    models.append(f"--model=broken={file}")
    file = folder / "bare.gguf"
    file.write_bytes(source.replace(b"tokenizer.chat_template", b"tokenizer.lost_template"))
    models.append(f"--model=bare={file}")
    (folder / "evil.jinja").write_text(HOSTILE_TEMPLATE)
    (folder / "loud.jinja").write_text("{{ messages[0].content | upper }}")
    given = [
        f'[[model]]\nname = "{name}:latest"\npath = "{file}"\ntemplate = "{folder}/{name}.jinja"\n'
        for name in ("evil", "loud")
    ]
    (folder / "box.toml").write_text(CONFIG + "".join(given))
    box = Box(folder / "home", "--config", str(folder / "box.toml"), *models).start()
    yield box
    box.end()
    for file in folder.glob("*.gguf"):
        file.unlink()


def chat(box: Box, family: str, messages: list[Any] = QUESTION, **more: Any) -> Any:
    options = {"model": f"{family}:latest", "max_tokens": 80, "seed": 1, **more}
    return box.client.chat.completions.create(messages=messages, **options)


def check_call(name: str, arguments: str) -> None:
    wanted = {"weather": WEATHER, "clock": CLOCK}[name]
    jsonschema.validate(json.loads(arguments), wanted["parameters"])


def only_a_head(choice: Any) -> bool:
    """Whether no text was said, but for the head of a last call that the limit has cut off."""
    text = (choice.message.content or "").lstrip()
    marks = ("<tool_call>", "[TOOL_CALLS]", "{")
    return not text or (choice.finish_reason == "length" and text.startswith(marks))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_that_must_be_made_is_valid(families: Box, family: str, parallel: bool) -> None:
    options: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": parallel,
    }
    for seed in (1, 2):
        (choice,) = chat(
            families, family, seed=seed, temperature=1.2, reasoning_effort="none", **options
        ).choices
        calls = choice.message.tool_calls
        assert calls and only_a_head(choice)
        assert choice.finish_reason == "tool_calls" or (
            parallel and choice.finish_reason == "length"
        )
        for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
            check_call(call.function.name, call.function.arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_named_call_is_streamed_as_deltas(families: Box, family: str) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": NAMED, "parallel_tool_calls": False}
    chunks = list(chat(families, family, stream=True, reasoning_effort="none", seed=3, **options))
    choices = [chunk.choices[0] for chunk in chunks]
    deltas = [delta for choice in choices for delta in choice.delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == "weather"
    assert not any(delta.id for delta in deltas[1:]) and len(deltas) > 3
    check_call("weather", "".join(delta.function.arguments or "" for delta in deltas))
    assert choices[-1].finish_reason == "tool_calls"
    assert not any(choice.delta.content for choice in choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_and_its_result_are_read(families: Box, family: str) -> None:
    """Also behind a system message, and where the template has neither tools nor such a role."""
    function = {"name": "weather", "arguments": '{"city": "Rome", "unit": "kelvin", "days": 1}'}
    call = {"id": "call00001", "type": "function", "function": function}
    messages = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "290 K and sunny"},
    ]
    answer = chat(families, family, messages, tools=TOOLS, tool_choice="none", max_tokens=6)
    told = chat(families, family, messages[:2], max_tokens=1)
    assert answer.usage.prompt_tokens > told.usage.prompt_tokens + 20


@pytest.mark.parametrize("family", FAMILIES)
def test_results_of_several_calls_are_read(families: Box, family: str) -> None:
    """Llama 3's template refuses several calls in one message: they are given one by one."""
    function = {"name": "clock", "arguments": "{}"}
    calls = [{"id": f"call0000{n}", "type": "function", "function": function} for n in (1, 2)]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": call["id"], "content": "Noon."} for call in calls),
    ]
    assert chat(families, family, messages, max_tokens=2).choices


ODD_CALLS: list[Any] = [
    {"function": {"name": "clock", "arguments": arguments}}
    for arguments in (None, {"zone": 1}, "[1]", '{"zone": "Ro', "it is noon")
]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_history_ends_a_chat(families: Box, family: str) -> None:
    """What models, tools and other programs leave in it; the openai library would not send it."""
    odd = [
        {"role": "assistant", "content": "Hello, I am here."},
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": ODD_CALLS},
        {"role": "tool", "content": None},
        {"role": "tool", "tool_call_id": "unknown", "content": {"degrees": 20}},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": ""},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Well?"},
        {"role": "tool", "tool_call_id": "of no call", "content": "Noon."},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    for messages in (odd, odd[2:3], odd[3:4], odd[:1], odd[7:8]):
        body = {"model": family, "messages": messages, "max_tokens": 1, "tools": TOOLS}
        answer = families.http("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text


def test_thoughts_are_apart_from_the_answer(families: Box) -> None:
    """The template opens them; without an end they are all there is."""
    message = chat(families, "qwen3", max_tokens=12).choices[0].message
    assert message.reasoning_content and not message.content
    chunks = list(chat(families, "qwen3", max_tokens=12, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thoughts) == message.reasoning_content
    assert not any(delta.content for delta in deltas)
    without = chat(families, "qwen3", max_tokens=12, reasoning_effort="none").choices[0].message
    assert without.content and not hasattr(without, "reasoning_content")


@pytest.mark.timeout(900)  # up to thirty answers of the real model
def test_thoughts_end_in_a_call(families: Box) -> None:
    """Which is then as it must be.  The weights know nothing of thoughts: a bias makes them end."""
    body = {"model": "qwen3", "text": "</think>"}
    mark = families.http("POST", "/v1/tokenize", json=body).json()["tokens"]  # no one token here
    options: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "logit_bias": {str(token): 5 for token in mark},
        "max_tokens": 120,
    }
    for seed in range(30):
        (choice,) = chat(families, "qwen3", seed=seed, **options).choices
        thoughts = getattr(choice.message, "reasoning_content", "")
        assert choice.finish_reason in ("tool_calls", "length") and only_a_head(choice)
        if choice.finish_reason == "tool_calls":
            (call,) = choice.message.tool_calls
            check_call(call.function.name, call.function.arguments)
            if thoughts.strip():
                return
    raise AssertionError("thoughts never came to an end")


def test_a_hostile_template_refuses_its_chats_and_nothing_else(families: Box) -> None:
    for more, limit in (({}, "of memory"), ({"tools": TOOLS}, "of CPU time")):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(families, "hostile", **more)
        assert "chat template of model 'hostile' takes more" in caught.value.message
        assert limit in caught.value.message
    done = families.client.completions.create(model="hostile:latest", prompt="One", max_tokens=3)
    assert done.choices[0].text


def test_a_file_without_a_template_gets_that_of_its_family(families: Box) -> None:
    said = chat(families, "bare", max_tokens=1)
    written = f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    done = families.client.completions.create(model="bare:latest", prompt=written, max_tokens=1)
    assert said.usage.prompt_tokens == done.usage.prompt_tokens


def test_a_configured_template_is_used_in_place_of_the_files_and_as_carefully(
    families: Box,
) -> None:
    said = chat(families, "loud", max_tokens=1)
    prompt = QUESTION[0]["content"].upper()
    done = families.client.completions.create(model="loud:latest", prompt=prompt, max_tokens=1)
    assert said.usage.prompt_tokens == done.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="chat template of model 'evil:latest' takes"):
        chat(families, "evil")


def test_a_broken_template_refuses_chats_and_nothing_else(families: Box) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(families, "broken")
    said = caught.value.message
    assert "chat template of model 'broken' is not valid Jinja" in said
    assert "use completions" in said
    done = families.client.completions.create(model="broken", prompt="One", max_tokens=2)
    assert done.choices[0].text
    assert families.client.embeddings.create(model="broken", input="One").data
