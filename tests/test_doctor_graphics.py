"""What the doctor says of GPUs: on machines that only exist as files, and with fake ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pinaivu_box.devices import Device
from pinaivu_box.doctor import graphics
from pinaivu_box.doctor.check import Check
from pinaivu_box.doctor.graphics import Seen, judge
from pinaivu_box.engine.messages import GgmlBackend
from pinaivu_box.nvml import GpuStatus
from tests.support import fake_gpu
from tests.support.gpu_machines import AMD, INTEL, NVIDIA, VIRTUAL, machine
from tests.support.process_box import pinaivu

MIB = 2**20
CPU = Device("CPU", "A processor", "cpu", total=8 << 30, free=4 << 30)
LIBCUDA = "libcuda.so.1"
NO_CUBLAS = GgmlBackend("cuda", problem="libcublas.so.13: not found", missing="libcublas.so.13")


def gpu(name: str = "CUDA0", slot: int = 1, **more: object) -> Device:
    status = GpuStatus("RTX 3060", 12 << 30, 11 << 30, pci_id=f"0000:0{slot}:00.0")
    return Device(name, "A card", "gpu", f"0000:0{slot}:00.0", 12 << 30, 11 << 30,
                  status=status if name.startswith("CUDA") else None)  # fmt: skip


@pytest.fixture(autouse=True)
def has_libcuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics, "_has_libcuda", lambda _: True)


@pytest.mark.parametrize(
    ("vendors", "driver", "seen", "found", "todo"),
    [
        ((), "", Seen(), "no GPU: models run on the CPU", ""),
        ((VIRTUAL,), "", Seen(), "no GPU", ""),
        ((NVIDIA,), "", Seen(), "there is an NVIDIA (10de:2504) card but no driver", "R580"),
        ((NVIDIA,), "550.54.15", Seen(), "driver 550.54.15 is older than R580", "update it"),
        ((NVIDIA,), "590.10", Seen(driver="590.10", cuda="12.8"),
         "driver 590.10 supports CUDA 12.8, and 13.0 is needed", "update it"),
        ((NVIDIA,), "580.95.05", Seen(cuda="13.0"),
         "this build has no CUDA backend", "build/run --cuda"),
        ((NVIDIA,), "580.95.05", Seen(cuda="13.0", backends=(NO_CUBLAS,)),
         "needs libcublas.so.13, which is nowhere here", "pip install nvidia-cublas==13.*"),
        ((NVIDIA,), "580.95.05",
         Seen(backends=(GgmlBackend("cuda", problem="x", missing=LIBCUDA),)),
         "no libcuda.so.1", "libcuda1"),
        ((NVIDIA,), "580.95.05",
         Seen(backends=(GgmlBackend("cuda", problem="not for this version"),)),
         "cannot be loaded (not for this version)", "compile it anew"),
        ((NVIDIA,), "580.95.05", Seen(backends=(GgmlBackend("cuda"),)),
         "CUDA shows no device", "CUDA_VISIBLE_DEVICES"),
        ((AMD,), "", Seen(), "an AMD (1002:2504) card, and this build has no backend", "--vulkan"),
        ((INTEL,), "", Seen(), "an Intel (8086:2504) card", "--vulkan"),
        ((AMD,), "", Seen(backends=(GgmlBackend("vulkan", problem="x", missing="libvulkan.so.1"),)),
         "needs libvulkan.so.1", "libvulkan1"),
        ((AMD,), "", Seen(backends=(GgmlBackend("vulkan"),)), "Vulkan shows no device", "mesa"),
        ((NVIDIA,), "580.95.05", Seen(failure="the engine crashed with signal 11: oops"),
         "cannot be listed: the engine crashed", "driver"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_used_is_explained(
    tmp_path: Path, vendors: Sequence[str], driver: str, seen: Seen, found: str, todo: str
) -> None:
    (check,) = judge(machine(tmp_path, *vendors, driver=driver), seen)
    assert found in check.found and todo in check.todo
    assert (check.state == "ok") == ("no GPU" in found or INTEL in vendors)


def test_a_driver_without_its_devices_is_a_container_without_the_gpu(tmp_path: Path) -> None:
    root = machine(tmp_path, NVIDIA, driver="580.95.05", nodes=False)
    (check,) = judge(root, Seen(backends=(GgmlBackend("cuda"),)))
    assert "/dev/nvidia" in check.found and "--gpus all" in check.todo


def test_gpus_that_are_used_are_named_with_their_memory(tmp_path: Path) -> None:
    seen = Seen(
        (CPU, gpu("CUDA0", 1), gpu("Vulkan0", 2)), (GgmlBackend("cuda", 1),), driver="580.95"
    )
    checks = list(judge(machine(tmp_path, NVIDIA, AMD, driver="580.95"), seen))
    assert [check.state for check in checks] == ["ok", "ok"]
    assert "CUDA0: RTX 3060" in checks[0].found and "driver 580.95" in checks[0].found
    assert "Vulkan0: A card" in checks[1].found


def test_a_second_card_that_is_not_used_is_told_beside_the_first(tmp_path: Path) -> None:
    seen = Seen((CPU, gpu("CUDA0", 1)), (GgmlBackend("cuda", 1),), driver="580.95")
    used, unused = judge(machine(tmp_path, NVIDIA, AMD, driver="580.95"), seen)
    assert used.state == "ok" and unused.state == "warning" and "AMD" in unused.found


def test_a_stand_in_for_cublas_is_told_with_what_it_costs(tmp_path: Path) -> None:
    backend = GgmlBackend("cuda", 1, stand_ins=["libcublas.so.13"])
    (check,) = judge(machine(tmp_path, NVIDIA, driver="580.95"), Seen((gpu(),), (backend,)))
    assert check.state == "warning" and "F16, BF16 or F32 run on the CPU" in check.found


def test_no_child_is_started_where_there_is_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def looked() -> Seen:
        raise AssertionError

    monkeypatch.setattr(graphics, "look", looked)
    assert list(graphics.gpus(machine(tmp_path, VIRTUAL), {})) == [
        Check("GPU", "ok", "no GPU: models run on the CPU")
    ]


def test_the_doctor_sees_what_an_engine_sees(tmp_path: Path) -> None:
    env = fake_gpu.environment("CUDA0:2048")
    done = pinaivu("doctor", "--json", home=tmp_path, env=env, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["GPU"]["state"] == "ok" and "CUDA0: Fake GPU" in checks["GPU"]["found"]
    assert "on Fake GPU" in checks["engine"]["found"]
    assert "smollm2:135m: all on CUDA0" in checks["memory"]["found"]
