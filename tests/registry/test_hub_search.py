"""Searching the Hub for models: by an endpoint, a command and the page, when an admin asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.models import record
from tests.support import gguf_files
from tests.support.in_process_box import InProcessBox, in_process_box
from tests.support.in_process_command import run_command, run_command_json
from tests.support.memory_transport import MemoryNetwork
from tests.support.registry_server import RegistryServer, registry_server

pytestmark = pytest.mark.anyio
EVIL = '<img src=x onerror="alert(1)">\u202e'


@pytest.fixture
def hub() -> Iterator[RegistryServer]:
    with registry_server() as running:
        running.add_found(
            "someone/Tiny-Llama-GGUF", downloads=1200, likes=7, gated=False,
            tags=["gguf", "license:apache-2.0", "region:us"],
            gguf={"total": 1_100_000_000, "architecture": "llama", "context_length": 2048},
        )  # fmt: skip
        running.add_found("someone/Tiny-Other-GGUF", gated="manual", tags=None, gguf=None)
        running.add_found(f"evil/{EVIL}tiny", downloads=5)
        running.add_found("evil/tiny-lies", downloads=-4, likes="many", tags=[1, f"license:{EVIL}"],
                          gguf={"total": True, "architecture": EVIL * 50})  # fmt: skip
        yield running


@pytest.fixture
async def box(hub: RegistryServer, tmp_path: Path) -> AsyncIterator[InProcessBox]:
    async with in_process_box(MemoryNetwork(), tmp_path / "a", registry__hub=hub.url) as running:
        yield running


async def searched(box: InProcessBox, words: str) -> list[dict[str, Any]]:
    answer = await box.http("GET", "/v1/admin/models/hub", params={"q": words})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def test_what_the_hub_has_is_found_by_words(box: InProcessBox, hub: RegistryServer) -> None:
    llama, other, lies = await searched(box, "tiny")
    assert llama == {
        "name": "hf.co/someone/Tiny-Llama-GGUF", "downloads": 1200, "likes": 7,
        "parameters": 1_100_000_000, "context": 2048, "architecture": "llama",
        "license": "apache-2.0", "gated": False, "served": False,
    }  # fmt: skip
    assert (other["gated"], other["parameters"], other["license"]) == (True, 0, "")
    assert (lies["downloads"], lies["likes"], lies["parameters"]) == (0, 0, 0)
    assert "\u202e" not in lies["license"] and len(lies["architecture"]) <= 100
    (asked,) = hub.searches
    assert asked["search"] == ["tiny"] and asked["filter"] == ["gguf"]
    assert await searched(box, "nothing like this") == []


async def test_a_model_that_is_here_says_so(box: InProcessBox) -> None:
    folder = box.box.home / "models"
    file = folder / "hf.co" / "someone" / "Tiny-Llama-GGUF:Q4_K_M.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(gguf_files.valid())
    record.write(file, record.ModelRecord("hf.co/someone/Tiny-Llama-GGUF:Q4_K_M"))
    await box.box.look_for_models()
    assert [model["served"] for model in await searched(box, "tiny")] == [True, False, False]


async def test_nobody_is_asked_unless_an_admin_searches(
    box: InProcessBox, hub: RegistryServer
) -> None:
    text = await box.page("/admin/models?q=tiny")
    assert "Search 127.0.0.1" in text and "no search for programs" in text
    assert not hub.searches and not hub.requests
    refused = await box.http("GET", "/v1/admin/models/hub", params={"q": ""})
    assert refused.status_code == 422 and not hub.searches
    for secret in ("sk-pnv-nobody", ""):
        answer = await box.http("GET", "/v1/admin/models/hub", params={"q": "tiny"}, secret=secret)
        assert answer.status_code == 401 and not hub.searches


async def test_a_hub_that_does_not_answer_is_told(box: InProcessBox, hub: RegistryServer) -> None:
    hub.close()
    hub.faults.token = "another"
    answer = await box.http("GET", "/v1/admin/models/hub", params={"q": "tiny"})
    assert answer.status_code == 409
    assert "cannot be reached" in answer.json()["error"]["message"]


def test_the_command_asks_the_hub_only_with_its_option(hub: RegistryServer, tmp_path: Path) -> None:
    config = tmp_path / "box.toml"
    config.write_text(f'[registry]\nhub = "{hub.url}"\n')
    options = ("--config", str(config))
    assert run_command_json("search", "tiny", *options, home=tmp_path) and not hub.searches
    found = run_command_json("search", "tiny", "--hub", *options, home=tmp_path)
    assert found[0]["name"] == "hf.co/someone/Tiny-Llama-GGUF"
    printed = run_command("search", "tiny", "--hub", *options, home=tmp_path).stdout
    assert "1.1 B" in printed and "gated" in printed and "\u202e" not in printed
    nothing = run_command("search", "--hub", *options, home=tmp_path, check=False)
    assert nothing.returncode != 0 and "name some words" in nothing.stderr
