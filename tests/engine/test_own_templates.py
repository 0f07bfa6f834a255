"""Files without a chat template: the family's own is used, or chats are refused."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama
import pytest

from pinaivu_box.engine import own_templates
from pinaivu_box.errors import BadRequest
from tests.support.engine_harness import BUDGET, Engine, Template, TemplatedRunner, add, run
from tests.support.real_runner import real_runner

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?"},
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAR = "\uff5c"
DEEPSEEK = f"<{BAR}User{BAR}> <{BAR}Assistant{BAR}>"
# Template, llama.cpp's name of the same format, the end token, tokens of the vocabulary and
# architecture by which it is recognised.
FAMILIES = [
    ("llama3", "llama3", "", "<|start_header_id|> <|end_header_id|> <|eot_id|>", "llama"),
    ("chatml", "chatml", "", "<|im_start|> <|im_end|>", "qwen2"),
    ("qwen3", "chatml", "", "<|im_start|> <|im_end|> <think> </think>", "qwen3"),
    ("phi4", "phi4", "", "<|im_start|> <|im_sep|> <|im_end|>", "phi3"),
    ("phi3", "phi3", "", "<|user|> <|assistant|> <|end|>", "phi3"),
    ("gemma", "gemma", "", "<start_of_turn> <end_of_turn>", "gemma2"),
    ("mistral", "mistral-v3", "</s>", "[INST] [/INST] ▁the", "llama"),
    ("mistral-tekken", "mistral-v3-tekken", "</s>", "[INST] [/INST]", "llama"),
    (
        "mistral-system",
        "mistral-v7-tekken",
        "</s>",
        "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        "llama",
    ),
    ("deepseek", "deepseek3", f"<{BAR}end▁of▁sentence{BAR}>", DEEPSEEK, "deepseek2"),
    ("command-r", "command-r", "", "<|START_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|>", "command-r"),
    ("granite", "granite", "", "<|start_of_role|> <|end_of_role|>", "granite"),
    ("glm4", "chatglm4", "", "[gMASK] <sop> <|user|> <|assistant|>", "chatglm"),
]
NAMES = [family[0] for family in FAMILIES]


def llama_cpps(name: str) -> str:
    """What llama.cpp makes of the chat in one of its own formats."""
    messages = (llama.llama_chat_message * len(CHAT))(
        *[llama.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in CHAT]
    )
    buffer = ctypes.create_string_buffer(4096)
    size = llama.llama_chat_apply_template(name.encode(), messages, len(CHAT), True, buffer, 4096)
    assert 0 < size < 4096, name
    return buffer.raw[:size].decode()


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_chat_is_written_as_llama_cpp_writes_it_for_the_family(family: Any) -> None:
    name, theirs, end, tokens, architecture = family
    found = own_templates.find(architecture, set(tokens.split()).__contains__)
    assert found == own_templates.source(name)
    expected = llama_cpps(theirs)
    if name == "deepseek":  # DeepSeek's own has no empty line there
        expected = expected.replace("\n\n", "")
    assert Template(found, eos=end).render(CHAT) == expected


@pytest.mark.parametrize("name", NAMES)
def test_tools_and_unusual_orders_are_told_in_words(name: str) -> None:
    template = Template(own_templates.source(name), eos="</s>")
    chat = [
        CHAT[1],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "system", "content": "Go on."},
    ]
    text = template.render(chat, [{"name": "weather", "parameters": {"type": "object"}}])
    assert all(word in text for word in ("weather", "sunny", "Go on.", '"f"'))


def test_thoughts_can_be_switched_off() -> None:
    template = Template(own_templates.source("qwen3"))
    assert template.thinks
    without = template.render(CHAT, variables={"enable_thinking": False})
    assert without.endswith("<think>\n\n</think>\n\n")
    assert not template.render(CHAT).endswith("</think>\n\n")


@pytest.mark.parametrize(
    "architecture, tokens",
    [("llama", "<s> </s>"), ("gpt2", "<|user|> <|assistant|> <|end|>"), ("", "")],
)
def test_other_files_have_none(architecture: str, tokens: str) -> None:
    assert own_templates.find(architecture, set(tokens.split()).__contains__) is None


def test_without_a_template_chats_are_refused_and_completions_work() -> None:
    engine = Engine(TemplatedRunner(None), token_budget=BUDGET)
    heard = run(engine, [add("chat"), add("completion", prompt="abc")])
    assert heard.refused["chat"].code == BadRequest.code
    assert "no chat template" in heard.refused["chat"].message
    assert "completion" not in heard.refused


def test_a_configured_template_takes_the_place_of_the_files() -> None:
    source = "{{ messages[0].content }}!"
    runner = real_runner(template=source)
    try:
        assert runner.facts.chat_template == source
    finally:
        runner.close()
