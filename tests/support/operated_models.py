"""Models of a box in this process, as an operator of it asks for them over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from pinaivu_box.models import record
from pinaivu_box.models.record import ModelRecord
from tests.support import gguf_files
from tests.support.in_process_box import InProcessBox

FILE = gguf_files.valid(
    gguf_files.u32("llama.context_length", 4096),
    gguf_files.word("tokenizer.chat_template", "{{ messages }}"),
)


def put_model(home: Path, model_id: str = "tiny:1b", **recorded: Any) -> Path:
    """A model file with its record in the models folder of a home."""
    file = home / "models" / "sub" / f"{model_id.replace('/', '_')}.gguf"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(FILE)
    record.write(file, ModelRecord(model_id, **recorded))
    return file


async def post(box: InProcessBox, action: str, **body: Any) -> httpx.Response:
    return await box.http("POST", f"/v1/admin/models/{action}", json=body)


async def done(box: InProcessBox, action: str, **body: Any) -> dict[str, Any]:
    answer = await post(box, action, **body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    assert content.pop("request_id").startswith("req_")
    return content


async def refusal(box: InProcessBox, action: str, **body: Any) -> tuple[int, str]:
    answer = await post(box, action, **body)
    return answer.status_code, answer.json()["error"]["message"]
