"""The devices of a machine: listing, memory, settings that choose among them, and failures."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from pinaivu_box import child, engine_query
from pinaivu_box.cli.banner import describe_devices
from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.engine import messages
from pinaivu_box.engine.messages import CPU, ListDevices, LoadModel, Probe, Probed, Ready
from pinaivu_box.engine_query import QueryFailed
from pinaivu_box.gateway.engine_process import StartFailed
from pinaivu_box.models import bundled, fit, gguf
from pinaivu_box.nvml import Nvml, pci_id
from tests.support import fake_gpu
from tests.support.bare_engine import ready_of
from tests.support.in_process_command import run_command
from tests.support.process_box import Box

pytestmark = pytest.mark.anyio

MIB = 2**20
TWO = "CUDA0:2048,CUDA1:1024"


@contextmanager
def machine(monkeypatch: pytest.MonkeyPatch, gpus: str = "", **more: str) -> Iterator[None]:
    """Children see these GPUs."""
    with monkeypatch.context() as patch:
        for name, value in {**fake_gpu.environment(gpus), **more}.items():
            patch.setenv(name, value)
        yield


def bundled_load(**settings: Any) -> LoadModel:
    where = bundled.find()
    assert where is not None
    load = LoadModel(str(where.path), where.offset, 1024, 4096, 4, 512, 1)
    return replace(load, **settings)


def bundled_header() -> gguf.Header:
    where = bundled.find()
    assert where is not None
    return gguf.read_header(where.path, where.offset, where.size)


# -- listing -----------------------------------------------------------------------------------


async def test_a_child_lists_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(monkeypatch, TWO):
        monitor = DeviceMonitor()
        devices = await monitor.list_anew()
    assert [(device.name, device.kind) for device in devices] == [
        ("CPU", "cpu"),
        ("CUDA0", "gpu"),
        ("CUDA1", "gpu"),
    ]
    assert [device.total // MIB for device in monitor.gpus] == [2048, 1024]
    assert devices[1].pci_id != devices[2].pci_id
    assert not monitor.failure


async def test_cuda_visible_devices_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(monkeypatch, TWO, CUDA_VISIBLE_DEVICES="1"):
        monitor = DeviceMonitor()
        await monitor.list_anew()
    assert [(device.name, device.total // MIB) for device in monitor.gpus] == [("CUDA0", 1024)]


async def test_no_child_is_started_on_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PINAIVU_BACKENDS", raising=False)
    monkeypatch.setattr(child, "command", lambda _: ["/nowhere"])
    (cpu,) = await DeviceMonitor(root=tmp_path).read()
    assert (cpu.name, cpu.kind) == (CPU, "cpu") and cpu.total > 0


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os; os.abort()", "crashed with signal 6"),
        ("import sys; print('no driver', file=sys.stderr); sys.exit(3)", "status 3: no driver"),
        ("import time; time.sleep(600)", "did not answer within 2 seconds"),
        ("import sys; sys.stderr.write('x' * 10**6 + '\\nlast'); sys.exit(1)", "status 1: last"),
        ("import sys; sys.stdout.buffer.write(b'\\xff' * 10**6)", "no frame"),
        ("import sys; sys.stdout.buffer.write(b'\\xff' * 8)", "no frame"),
    ],
)
async def test_a_child_that_fails_while_it_lists_leaves_the_box_without_devices(
    monkeypatch: pytest.MonkeyPatch, program: str, why: str
) -> None:
    monkeypatch.setattr(child, "command", lambda _: [sys.executable, "-c", program])
    monitor = DeviceMonitor()
    # Those that end do so at once; the clock is for the one that does not.
    assert await monitor.list_anew(2 if "sleep" in program else 60) == []
    assert why in monitor.failure


async def test_a_child_that_was_started_for_one_answer_ends_with_its_parents_pipe() -> None:
    answer = await engine_query.ask(ListDevices(), messages.Devices, 60)
    assert answer.devices[0].name == CPU


# -- NVML --------------------------------------------------------------------------------------

READ_NVML = """
import asyncio, msgspec
from pinaivu_box.devices import DeviceMonitor
devices = asyncio.run(DeviceMonitor().list_anew())
print(msgspec.json.encode(devices).decode())
"""


def listed_with(environment: dict[str, str]) -> list[dict[str, Any]]:
    """What a process of its own says, since a library is found or not when a process starts."""
    done = subprocess.run(
        [sys.executable, "-c", READ_NVML],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_devices_are_joined_with_nvml_by_their_pci_address(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    (tmp_path / "others").write_text("1 300 4711\n")
    environment = fake_gpu.environment(
        TWO, nvml="RTX 3060:2048:100,RTX 4090:1024:20", shared=tmp_path
    )
    cpu, first, second = listed_with(environment)
    assert cpu["status"] is None and not cpu["measured"]
    assert first["status"]["name"] == "RTX 3060" and second["status"]["name"] == "RTX 4090"
    assert first["measured"] and first["status"]["temperature"] is not None
    assert first["free"] == first["status"]["free"]
    assert [each["pid"] for each in second["status"]["processes"]] == [4711]
    assert second["free"] <= (1024 - 300) * MIB
    # Hidden devices are NVML's still, and nobody's here.
    (hidden,) = listed_with({**environment, "CUDA_VISIBLE_DEVICES": "1"})[1:]
    assert (hidden["name"], hidden["status"]["name"]) == ("CUDA0", "RTX 4090")


def test_without_its_library_nvml_says_why_and_costs_nothing() -> None:
    nvml = Nvml()
    nvml.gpus()
    if not nvml.why_not:
        pytest.skip("this machine has NVML")
    began = time.monotonic()
    for _ in range(1000):
        assert nvml.gpus() == []
    assert time.monotonic() - began < 5  # it is not looked for again


def test_addresses_of_nvml_are_written_as_those_of_linux() -> None:
    assert pci_id("00000000:C1:00.0") == pci_id("0000:c1:00.0") == "0000:c1:00.0"
    assert pci_id("00000001:02:00.0") == "0001:02:00.0"
    assert pci_id("") == ""


async def test_the_memory_of_an_amd_card_is_read_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(monkeypatch, "Vulkan0:2048"):
        first = await DeviceMonitor().list_anew()
        folder = tmp_path / "sys/bus/pci/devices" / first[1].pci_id
        folder.mkdir(parents=True)
        (folder / "mem_info_vram_total").write_text("2147483648\n")
        (folder / "mem_info_vram_used").write_text("147483648\n")
        devices = await DeviceMonitor(root=tmp_path).list_anew()
    assert devices[1].measured and devices[1].free == 2_000_000_000


# -- settings ----------------------------------------------------------------------------------


def memory_of(ready: Ready) -> dict[str, messages.DeviceMemory]:
    return {each.device: each for each in ready.memory}


@pytest.mark.parametrize(
    ("settings", "devices", "layers"),
    [
        ({}, ["CUDA0", "CUDA1"], None),
        ({"devices": ["CUDA1"]}, ["CUDA1"], {"CUDA1": 31}),
        ({"devices": ["CUDA1", "CUDA0"], "tensor_split": [10, 21]}, ["CUDA1", "CUDA0"],
         {"CUDA1": 10, "CUDA0": 21}),
        ({"split": "none", "main_device": "CUDA1"}, ["CUDA1"], {"CUDA1": 31}),
        ({"devices": ["CUDA0"], "gpu_layers": 10}, ["CUDA0"], {"CUDA0": 10}),
        ({"gpu_layers": 0}, [], {}),
        ({"devices": ["CUDA0"], "kv_type": "q8_0"}, ["CUDA0"], {"CUDA0": 31}),
    ],
)  # fmt: skip
async def test_a_model_goes_where_its_settings_say_and_takes_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    devices: list[str],
    layers: dict[str, int] | None,
) -> None:
    load = bundled_load(**settings)
    with machine(monkeypatch, TWO):
        ready = await ready_of(load)
    taken = memory_of(ready)
    assert list(taken) == [*devices, CPU]
    assert all(taken[name].weights and taken[name].cache for name in devices)
    names = ["Fake GPU"] * len(devices)
    whole = devices and settings.get("gpu_layers", 31) == 31
    assert ready.device.split(", ")[: len(names)] == names
    assert (ready.device.count(",") == len(names) - 1) == bool(whole)
    if layers is None:
        return
    predicted = fit.spread(fit.need(bundled_header(), load), list(layers.items()))
    for share in (*predicted.gpus, predicted.host):
        measured = taken[share.memory.device]
        assert share.memory.weights == pytest.approx(measured.weights, rel=0.01)
        assert share.memory.cache == pytest.approx(measured.cache, rel=0.01)
        assert share.total == pytest.approx(measured.total, rel=0.05)


async def test_a_split_by_tensors_has_a_part_of_every_layer_on_each_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine(monkeypatch, TWO):
        ready = await ready_of(bundled_load(split="tensor"))
    taken = memory_of(ready)
    assert list(taken) == ["CUDA0", "CUDA1", CPU]
    assert taken["CUDA0"].cache == taken["CUDA1"].cache > 0 == taken[CPU].cache


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"devices": ["CUDA7"]}, r"there is no device CUDA7 here: there are CPU, CUDA0, CUDA1"),
        ({"devices": ["CUDA0"], "main_device": "CUDA1"},
         "main_device is CUDA1, and the model's are CUDA0"),
        ({"tensor_split": [1.0]}, "tensor_split has 1 numbers, and the model has 2 GPUs"),
        ({"tensor_split": [0.0, 0.0]}, "tensor_split has no number above 0"),
        ({"split": "tensor", "devices": ["CUDA0"]}, 'split = "tensor" needs two GPUs at least'),
    ],
)  # fmt: skip
async def test_settings_that_cannot_be_followed_are_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sentence: str
) -> None:
    load = bundled_load(**settings)
    with machine(monkeypatch, TWO):
        with pytest.raises(QueryFailed, match=sentence):
            await engine_query.ask(Probe(load), Probed, 60)
        with pytest.raises(StartFailed, match=sentence):
            await ready_of(load)


# -- memory that is short ----------------------------------------------------------------------


@pytest.mark.parametrize(("mib", "purpose"), [(64, "weights"), (150, "cache"), (260, "compute")])
async def test_a_device_that_is_too_small_is_named_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, mib: int, purpose: str
) -> None:
    with machine(monkeypatch, f"CUDA0:{mib}"), pytest.raises(StartFailed) as failed:
        await ready_of(bundled_load())
    shortage = failed.value.memory
    assert shortage is not None
    assert (shortage.device, shortage.purpose) == ("CUDA0", purpose)
    assert shortage.wanted > 0
    assert f"CUDA0 has no room for {shortage.wanted / MIB:,.0f} MiB for" in failed.value.message


# -- a box with GPUs ---------------------------------------------------------------------------


@contextmanager
def running(box: Box) -> Iterator[Box]:
    try:
        yield box.start()
    finally:
        box.end()


def test_a_box_tells_its_devices_and_what_engines_take_there(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    shared = tmp_path / "shared"
    shared.mkdir()
    env = fake_gpu.environment(TWO, nvml="RTX 3060:2048:100,RTX 4090:1024:20", shared=shared)
    with running(Box(tmp_path / "home", env=env)) as box:
        assert box.chat(model="smollm2:135m", max_tokens=1).status_code == 200
        (engine,) = box.engines()
        assert engine["device"] == "Fake GPU" and "all on CUDA0" in engine["why"]
        taken = {each["device"]: each for each in engine["devices"]}
        listed = box.http("GET", "/v1/admin/devices").json()
        devices = {device["name"]: device for device in listed["data"]}
        assert list(devices) == ["CPU", "CUDA0", "CUDA1"]
        assert devices["CUDA0"]["description"] == "RTX 3060" and devices["CUDA0"]["measured"]
        total = sum(taken["CUDA0"][part] for part in ("weights", "cache", "compute"))
        assert devices["CUDA0"]["used"] == total > 0 == devices["CUDA1"]["used"]
        assert devices["CUDA0"]["others"] == 0  # the engine's own process is none of them
        assert [backend["name"] for backend in listed["backends"]] == ["cuda"]

        scraped = httpx.get(f"{box.url}/metrics", timeout=60).text
        metrics = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(scraped)
            for sample in family.samples
        }
        assert metrics["pinaivu_device_memory_bytes", "CUDA0", "used"] == total
        assert metrics["pinaivu_device_memory_bytes", "CUDA1", "total"] == 1024 * MIB
        for name in ("utilisation_ratio", "temperature_celsius", "power_watts"):
            assert metrics[f"pinaivu_device_{name}", "CUDA1"] > 0

        shown = run_command("ps", "--devices", home=box.home).stdout
        assert "RTX 3060" in shown and "°C" in shown
        assert "CUDA0 " in run_command("ps", home=box.home).stdout
        assert "Devices   CUDA0 RTX 3060, 2,147 MB, CUDA1 RTX 4090" in box.output

        fit = box.http(
            "POST", "/v1/admin/models/show", json={"model": "smollm2:135m", "fit": True}
        ).json()["fit"]
        assert fit["fits"] and [part["device"] for part in fit["devices"]] == ["CUDA0", "CPU"]
        assert all(part["left"] == part["free"] - part["total"] for part in fit["devices"])
        assert fit["devices"][0]["total"] == pytest.approx(total, rel=0.05)


def test_a_device_that_fails_in_a_step_ends_the_engine_with_a_sentence(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    env = fake_gpu.environment("CUDA0:2048", shared=shared)
    with running(Box(tmp_path / "home", env=env)) as box:
        assert box.chat(model="smollm2:135m", max_tokens=1).status_code == 200
        (shared / "fail").write_text("CUDA0:fail:0")
        box.chat(model="smollm2:135m", max_tokens=1)
        errors = box.errors
    assert "computing on CUDA0, CPU: llama_decode failed with" in errors
    assert "Traceback" not in errors


def test_a_box_without_a_gpu_says_so_and_shows_where_models_go(tmp_path: Path) -> None:
    monitor_text = asyncio.run(describe_devices(DeviceMonitor(root=tmp_path)))
    assert monitor_text.endswith(" (no GPU)") or "pinaivu doctor" in monitor_text
    shown = run_command("show", "smollm2:135m", "--fit", home=tmp_path).stdout
    assert "on the CPU" in shown and "LEFT" in shown


async def test_the_start_of_a_box_does_not_wait_for_a_driver_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PINAIVU_BACKENDS", "/nowhere")
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(child, "command", lambda _: hanging)
    shown = await describe_devices(DeviceMonitor(), seconds=1)
    assert shown.startswith("still being listed")
