"""Asks about images with OpenAI's and Anthropic's packages, and prints an answer a line.  It runs
where the clients are.

python images.py URL KEY MODEL FILE...
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import anthropic
import openai

url, key, model, *files = sys.argv[1:]
chats: Any = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
messages: Any = anthropic.Anthropic(base_url=url, api_key=key).messages


def chat(data: str) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What is it?"},
    ]
    done = chats.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
    )
    return str(done.choices[0].message.content)


def response(data: str) -> str:
    url = f"data:image/png;base64,{data}"
    content = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "What is it?"},
    ]
    done = chats.responses.create(
        model=model,
        input=[{"role": "user", "content": content}],
        temperature=0,
        max_output_tokens=8,
    )
    return str(done.output_text)


def message(data: str) -> str:
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    done = messages.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=8,
        extra_body={"temperature": 0},
    )
    return "".join(block.text for block in done.content if block.type == "text")


for file in files:
    data = base64.b64encode(Path(file).read_bytes()).decode()
    texts = {ask(data) for ask in (chat, response, message)}
    assert len(texts) == 1, texts
    print(json.dumps(texts.pop()))
