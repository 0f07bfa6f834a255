"""Asks about an image with OpenAI's and Anthropic's packages.  It runs where the clients are.

python images.py URL KEY MODEL FILE
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import anthropic
import openai

url, key, model, file = sys.argv[1:]
data = base64.b64encode(Path(file).read_bytes()).decode()
data_url = f"data:image/png;base64,{data}"
chats: Any = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
chat = chats.chat.completions.create(
    model=model,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url}},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ],
    temperature=0,
    max_tokens=8,
)
response = chats.responses.create(
    model=model,
    input=[
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url, "detail": "auto"},
                {"type": "input_text", "text": "What is it?"},
            ],
        }
    ],
    temperature=0,
    max_output_tokens=8,
)
source = {"type": "base64", "media_type": "image/png", "data": data}
message = anthropic.Anthropic(base_url=url, api_key=key).messages.create(
    model=model,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image", "source": source},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ],
    max_tokens=8,
    extra_body={"temperature": 0},
)
texts = {
    chat.choices[0].message.content,
    response.output_text,
    "".join(block.text for block in message.content if block.type == "text"),
}
assert len(texts) == 1, texts
print(texts.pop())
