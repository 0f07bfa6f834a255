"""`keep_alive` and `ttl` of a request: how long the model stays loaded after it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.config import Config, EngineConfig, ModelConfig
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.models import catalog_loader, memory
from pinaivu_box.models.catalog import Catalog, Model, digest_of
from pinaivu_box.settings import BoxSettings, LiveSettings
from tests.support import waiting
from tests.support.in_process_command import run_command_json
from tests.support.process_box import Box, wait_until

CONFIG = """
[engine]
drafting = false
keep_alive = "{keep_alive}"
max_keep_alive = "{most}"
[[model]]
name = "slow:1"
path = "fake:20"
[[model]]
name = "one:1"
path = "fake:0"
[[model]]
name = "two:1"
path = "fake:0"
"""
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def start(home: Path, keep_alive: str, most: str) -> Box:
    home.mkdir()
    (home / "config.toml").write_text(CONFIG.format(keep_alive=keep_alive, most=most))
    return Box(home).start()


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """It keeps models for long, so that only a request unloads one."""
    started = start(tmp_path_factory.mktemp("keep") / "home", "1h", "0")
    yield started
    started.end()


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """It unloads models at once, so that only a request keeps one."""
    started = start(tmp_path_factory.mktemp("keep") / "home", "0", "2h")
    yield started
    started.end()


def ask(box: Box, model: str, key: str | None = None, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, **more}
    return box.http("POST", "/v1/chat/completions", key=key, json=body)


def loaded(box: Box) -> dict[str, int]:
    return {engine["model"]: engine["pid"] for engine in box.engines()}


def await_unloaded(box: Box, model: str) -> None:
    wait_until(lambda: model not in loaded(box), f"{model} to be unloaded")


def new_key(box: Box, *options: str) -> str:
    return str(run_command_json("keys", "create", *options, home=box.home)["key"])


ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"prompt": "Say hello.", "max_tokens": 2},
    "/v1/responses": {"input": "Say hello.", "max_output_tokens": 2},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2},
    "/v1/embeddings": {"input": "Say hello."},
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_takes_keep_alive(box: Box, path: str) -> None:
    body = {"model": "one:1", **ENDPOINTS[path]}
    first, second = ("keep_alive", "ttl") if "completions" in path else ("ttl", "keep_alive")
    answer = box.http("POST", path, json={**body, first: 60}, headers={"x-pinaivu-strict": "1"})
    assert answer.status_code == 200 and "one:1" in loaded(box), answer.text
    answer = box.http("POST", path, json={**body, second: 0})
    assert answer.status_code == 200, answer.text
    assert "x-pinaivu-ignored" not in answer.headers
    await_unloaded(box, "one:1")


@pytest.mark.parametrize("value", [0.01, "0", "1ms", "0h0m0.01s"])
def test_its_values_are_seconds_or_times_with_a_unit(box: Box, value: Any) -> None:
    answer = ask(box, "one:1", keep_alive=value)
    assert answer.status_code == 200, answer.text
    await_unloaded(box, "one:1")


@pytest.mark.parametrize(
    "value", ["soon", "", "5 weeks", True, [], {}, "1e3", "5m" * 30, "9999999d"]
)
def test_an_invalid_time_is_refused(box: Box, value: Any) -> None:
    for name in ("keep_alive", "ttl"):
        answer = ask(box, "one:1", **{name: value})
        assert answer.status_code == 422, answer.text
        error = answer.json()["error"]
        assert "keep_alive" in error["param"] and error["message"]


def test_the_latest_keep_alive_of_a_key_counts(box: Box) -> None:
    ask(box, "one:1", keep_alive=0)
    await_unloaded(box, "one:1")
    assert ask(box, "one:1", keep_alive="30m").status_code == 200
    assert ask(box, "one:1").status_code == 200
    assert "one:1" in loaded(box)
    assert ask(box, "one:1", keep_alive="30m", ttl=0).headers["x-pinaivu-ignored"] == "ttl"
    ask(box, "two:1", keep_alive=0)
    await_unloaded(box, "two:1")
    assert "one:1" in loaded(box)
    ask(box, "one:1", keep_alive=0)
    await_unloaded(box, "one:1")


def test_a_model_in_use_by_another_tenant_is_not_unloaded(box: Box) -> None:
    """Who asks for it over and over makes nobody load it again, for as long as models are kept."""
    other = new_key(box)
    assert ask(box, "one:1", key=other).status_code == 200
    engine = loaded(box)["one:1"]
    for _ in range(5):
        assert ask(box, "one:1", keep_alive=0).status_code == 200
    ask(box, "two:1", keep_alive=0)
    await_unloaded(box, "two:1")  # so one:1 would have been, too
    assert loaded(box)["one:1"] == engine
    ask(box, "one:1", key=other, keep_alive=0)
    await_unloaded(box, "one:1")


def test_a_waiting_request_keeps_the_model_loaded(box: Box) -> None:
    """For its key's turn, while another of that key runs elsewhere."""
    key = new_key(box, "--max-parallel", "1", "--max-queue", "1")
    options: Any = {"messages": HELLO, "max_tokens": 4000}
    with (
        ThreadPoolExecutor(2) as threads,
        box.client_with(key).chat.completions.create(
            model="slow:1", stream=True, **options
        ) as running,
    ):
        next(iter(running))
        both = [threads.submit(ask, box, "two:1", key, keep_alive=0) for _ in range(2)]
        wait_until(lambda: any(one.done() for one in both), "one to be refused, as the other waits")
        (waiting,) = (one for one in both if not one.done())
        assert ask(box, "two:1", keep_alive=0).status_code == 200
        engine = loaded(box)["two:1"]
        ask(box, "one:1", keep_alive=0)
        await_unloaded(box, "one:1")
        assert loaded(box)["two:1"] == engine and not waiting.done()
        running.close()
        assert waiting.result().status_code == 200
    await_unloaded(box, "two:1")


def test_a_count_before_the_request_does_not_unload(box: Box) -> None:
    key = new_key(box, "--tpm", "100000")
    before = box.errors.count("engine of two:1 ready")
    assert ask(box, "two:1", key=key, keep_alive=0).status_code == 200
    await_unloaded(box, "two:1")
    assert box.errors.count("engine of two:1 ready") == before + 1


def test_a_longer_time_is_cut_to_the_maximum_and_reported(brief: Box) -> None:
    for given in ("1h30m", 3600, "2h", 0):
        answer = ask(brief, "one:1", keep_alive=given)
        assert answer.status_code == 200 and "x-pinaivu-ignored" not in answer.headers
    await_unloaded(brief, "one:1")
    assert ask(brief, "one:1", keep_alive="1h").status_code == 200
    ask(brief, "two:1")
    await_unloaded(brief, "two:1")
    assert "one:1" in loaded(brief)
    for seconds in (-1, "-1", "3h", 1e300):
        answer = ask(brief, "one:1", keep_alive=seconds)
        assert answer.headers["x-pinaivu-ignored"] == "keep_alive"
        assert answer.json()["ignored_parameters"] == ["keep_alive"]
    strict = {"x-pinaivu-strict": "1"}
    body = {"model": "one:1", "messages": HELLO, "max_tokens": 4, "keep_alive": "3h"}
    refused = brief.http("POST", "/v1/chat/completions", json=body, headers=strict)
    assert refused.status_code == 422 and "max_keep_alive" in refused.json()["error"]["message"]


def test_the_default_holds_beside_a_lower_maximum(box: Box) -> None:
    """`max_keep_alive` below `keep_alive` shortens nothing."""
    answer = ask(box, "one:1", keep_alive="50m")
    assert "x-pinaivu-ignored" not in answer.headers


def test_a_reload_shortens_the_time_of_an_idle_model(tmp_path: Path) -> None:
    box = start(tmp_path / "home", "1h", "1h")
    try:
        ask(box, "one:1")
        (box.home / "config.toml").write_text(CONFIG.format(keep_alive="0", most="0"))
        done = box.http("POST", "/v1/admin/reload").json()
        assert done["applied"] == ["engine.keep_alive", "engine.max_keep_alive"]
        await_unloaded(box, "one:1")
    finally:
        box.end()


def placement_of(*names: str) -> tuple[Placement, Catalog]:
    """A placement of models that no request needs for an hour."""
    models = [ModelConfig(name=name, path="fake:0") for name in names]
    config = Config(engine=EngineConfig(keep_alive="1h"), model=models)

    async def digest(model: Model) -> str:
        return digest_of(model)

    found = catalog_loader.load(config, Path("/nonexistent"))
    return Placement(LiveSettings(BoxSettings(config)), digest), found


@pytest.mark.anyio
async def test_a_model_that_is_unloaded_while_requests_run_goes_after_the_last_of_them() -> None:
    placement, models = placement_of("one:1")
    one = models.find("one:1")
    try:
        assert await placement.unload("one:1") is None
        placement.release(await placement.acquire(one), "before", keep_alive=3600)
        first, second = await placement.acquire(one), await placement.acquire(one)
        assert await placement.unload("one:1") == 2
        placement.release(first, "first", keep_alive=3600)
        await asyncio.sleep(0.3)  # longer than it waits for the next one
        assert second.alive
        placement.release(second, "second")
        await waiting.wait_until(lambda: "one:1" not in placement.loaded)
        await second.closed.wait()
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_a_request_after_the_unload_has_the_running_engine_and_keeps_it() -> None:
    placement, models = placement_of("one:1")
    one = models.find("one:1")
    try:
        first = await placement.acquire(one)
        assert await placement.unload("one:1") == 1
        second = await placement.acquire(one)
        assert second is first
        placement.release(first, "first", keep_alive=0)
        placement.release(second, "second", keep_alive=60)
        await asyncio.sleep(0.5)
        assert first.alive
        assert await placement.unload("one:1") == 0
        assert not first.alive
        assert placement.loaded == set()
    finally:
        await placement.close()


@pytest.mark.anyio
async def test_memory_that_an_unloaded_model_still_holds_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rather than refusing the next model, shrinking its cache or unloading what is to stay."""
    placement, models = placement_of("kept:1", "left:1", "next:1")
    try:
        placement.release(await placement.acquire(models.find("kept:1")))
        left = await placement.acquire(models.find("left:1"))
        monkeypatch.setattr(memory, "available", lambda: 0 if left.alive else 2**40)
        os.kill(left.pid, signal.SIGSTOP)  # it takes its time to end
        placement.release(left, keep_alive=0)
        await waiting.wait_until(lambda: "left:1" not in placement.loaded)
        acquiring = asyncio.create_task(placement.acquire(models.find("next:1")))
        await asyncio.sleep(0)
        os.kill(left.pid, signal.SIGCONT)
        engine = await acquiring
        assert engine.ready.kv_tokens == memory.DEFAULT_KV_TOKENS
        assert placement.loaded == {"kept:1", "next:1"}
    finally:
        await placement.close()
