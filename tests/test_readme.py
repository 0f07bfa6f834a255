"""What README.md and docs/api.md list is so; the commands of the README are run by
tests/test_task_pages.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import msgspec
import pytest

from pinaivu_box.openai.types import ChatRequest
from tests.support.documents import README, ROOT, read, section
from tests.support.process_box import Box

API = "docs/api.md"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    started = Box(tmp_path_factory.mktemp("readme") / "home").start()
    yield started
    started.end()


def test_the_parameters_that_are_served_are_listed() -> None:
    named = set(re.findall(r'[`"](\w+)[`".]', section(API, "Parameters")))
    assert {field.name for field in msgspec.structs.fields(ChatRequest)} <= named


@pytest.mark.parametrize(
    "address", re.findall(r"`(?:GET )?(/[^`]+)`", section(API, "Endpoints").partition("`GET /`")[0])
)
def test_the_addresses_are_there(box: Box, address: str) -> None:
    request_id = box.chat(max_tokens=1).json()["request_id"]
    made = box.client.responses.create(model="smollm2:135m", input="hi", max_output_tokens=1)
    path = address.replace("/responses/{id}", f"/responses/{made.id}")
    path = path.replace("{id}", "smollm2:135m").replace("{request_id}", request_id)
    assert box.http("GET", path).status_code == 200


def test_the_scripts_that_the_readme_names_are_there() -> None:
    for script in set(re.findall(r"\bbuild/\w+\b(?!\.)", read(README))):
        assert os.access(ROOT / script, os.X_OK), script
