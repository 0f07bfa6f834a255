"""The system prompt that a model's publisher recommends: for chats that have none of their own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.gateway.backend import Job
from pinaivu_box.legs.codec import to_job, to_task
from pinaivu_box.models import bundled, record
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.record import ModelRecord
from tests.support.in_process_box import InProcessBox, in_process_box
from tests.support.in_process_command import run_command
from tests.support.memory_transport import MemoryNetwork
from tests.support.process_box import MODEL

pytestmark = pytest.mark.anyio

SYSTEM = "You are a pirate, and answer as pirates do, in every language that is asked of you."
SAID = {"role": "user", "content": "Who are you?"}
OWN = {"role": "system", "content": SYSTEM}


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[InProcessBox]:
    """A box that has the bundled model once more, as `pirate:1`, with a system prompt."""
    location, file = bundled.find(), tmp_path / "anna" / "models" / "pirate:1.gguf"
    assert location is not None
    file.parent.mkdir(parents=True)
    with location.path.open("rb") as source:
        source.seek(location.offset)
        file.write_bytes(source.read(location.size))
    record.write(file, ModelRecord("pirate:1", system=SYSTEM))
    async with in_process_box(MemoryNetwork(), tmp_path / "anna") as made:
        yield made


async def prompt_tokens(box: InProcessBox, path: str, model: str, **body: Any) -> int:
    """How long the prompt of a request is."""
    answer = await box.http("POST", path, json={"model": model, **body})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    names = ("input_tokens", "prompt_eval_count")
    usage = content.get("usage") or {}
    return int(
        next((content[name] for name in names if name in content), None)
        or usage.get("prompt_tokens")
        or usage["input_tokens"]
    )


async def test_it_is_used_on_every_api_for_chats_that_have_none(
    box: InProcessBox, tmp_path: Path
) -> None:
    few = {"stream": False, "options": {"num_predict": 1}}
    for path, without, with_own in (
        (
            "/v1/chat/completions/input_tokens",
            {"messages": [SAID]},
            {"messages": [OWN, SAID]},
        ),
        (
            "/v1/messages/count_tokens",
            {"messages": [SAID], "max_tokens": 1},
            {"messages": [SAID], "max_tokens": 1, "system": SYSTEM},
        ),
        ("/api/chat", {"messages": [SAID], **few}, {"messages": [OWN, SAID], **few}),
        (
            "/api/generate",
            {"prompt": SAID["content"], **few},
            {"prompt": SAID["content"], "system": SYSTEM, **few},
        ),
        (
            "/v1/responses",
            {"input": SAID["content"], "max_output_tokens": 1},
            {"input": SAID["content"], "max_output_tokens": 1, "instructions": SYSTEM},
        ),
    ):
        lengths = [
            await prompt_tokens(box, path, "pirate:1", **body) for body in (without, with_own)
        ]
        assert lengths[0] == lengths[1], path
        assert await prompt_tokens(box, path, MODEL, **with_own) == lengths[1]
        assert await prompt_tokens(box, path, MODEL, **without) != lengths[0]
    plain = {"prompt": "Once", "max_tokens": 1}
    lengths = [await prompt_tokens(box, "/v1/completions", m, **plain) for m in ("pirate:1", MODEL)]
    assert lengths[0] == lengths[1]
    # The receipt is about what was asked: the owner verifies it with that alone.
    asked = {"model": "pirate:1", "messages": [SAID], "max_tokens": 2}
    answer = await box.http("POST", "/v1/chat/completions", json=asked)
    receipt = await box.http("GET", f"/v1/receipts/{answer.json()['request_id']}")
    files = {"receipt": receipt.text, "request": json.dumps(asked), "answer": answer.text}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = ("--request", str(tmp_path / "request"), "--answer", str(tmp_path / "answer"))
    done = run_command("receipts", "verify", str(tmp_path / "receipt"), *options, home=tmp_path)
    assert "FAILED" not in done.stdout and "prompt commitment" in done.stdout


def test_a_peer_gets_it_with_the_request() -> None:
    """So that all boxes of a request make one prompt, whatever records they have."""
    job = Job(
        "req_01h00000000000000000000000", Model("m:1", Path()), [SAID], SamplingParams(seed=1),
        None, [], "key", system=SYSTEM,
    )  # fmt: skip
    there = to_job(to_task(job), Model("m:1", Path()), "peer")
    assert there.rendered == job.rendered == [OWN, SAID]
    assert there.messages == [SAID]
