"""The checks of tests/gpu/run.  They take whatever backend is installed: with the fake one they
run too, on a machine without a GPU, which is how they are tested themselves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pinaivu_box.models import bundled
from tests.support.backend_probe import probe
from tests.support.paths import ROOT
from tests.support.process_box import Box

MEMORY_LEFT_MIB = 48  # not enough for the bundled model
CONTEXT = 256
ENGINE_TESTS = ["tests/engine"]
STREAMS = "streams-1,streams-16,streams-64"


class NotDone(Exception):
    """The check could not be made here; the message says why, and what it takes."""


class Failed(Exception):
    """What was found is wrong."""


class Machine:
    """What the checks are given, and what they all want to know."""

    def __init__(self, llama_server: Path | None, model: Path | None, results: Path) -> None:
        self.llama_server, self.results = llama_server, results
        self._model = model

    @cached_property
    def backends(self) -> list[dict[str, Any]]:
        return list(probe({})["backends"])

    @cached_property
    def gpu_count(self) -> int:
        return sum(int(one["devices"]) for one in self.backends)

    @cached_property
    def gpus(self) -> str:
        """As NVIDIA's own program names them."""
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return "; ".join(done.stdout.splitlines()[1:])

    @property
    def model(self) -> Path:
        if self._model:
            return self._model
        found = bundled.find()
        assert found, "there is no bundled model: build/run puts it there"
        return found.path

    def needs_gpu(self) -> None:
        if not self.gpu_count:
            why = "; ".join(f"{one['name']}: {one['problem']}" for one in self.backends)
            raise NotDone(f"no backend shows a GPU ({why or 'none is installed'})")


@dataclass(frozen=True)
class Check:
    """`run` returns what it found.  Raises NotDone, Failed, AssertionError."""

    name: str
    what: str
    run: Callable[[Machine], str]


# -- devices -------------------------------------------------------------------------------------


def devices(machine: Machine) -> str:
    machine.needs_gpu()
    broken = [one for one in machine.backends if one["problem"]]
    if broken:
        raise Failed(f"{broken[0]['name']} was not loaded: {broken[0]['problem']}")
    stand_ins = [name for one in machine.backends for name in one["stand_ins"]]
    return f"{machine.gpu_count} by {machine.backends[0]['path']}; stand-ins: {stand_ins or 'none'}"


def same_tokens(machine: Machine) -> str:
    """Greedy tokens of the bundled model, on the GPU and without it."""
    machine.needs_gpu()
    on_gpu = probe({}, CONTEXT)["tokens"]
    on_cpu = probe({"PINAIVU_BACKENDS": "", "CUDA_VISIBLE_DEVICES": ""}, CONTEXT)["tokens"]
    if on_gpu != on_cpu:
        raise Failed(f"the GPU says {on_gpu}, the CPU {on_cpu}")
    return f"{len(on_gpu)} tokens are the same"


def engine_suite(machine: Machine) -> str:
    machine.needs_gpu()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *ENGINE_TESTS], cwd=ROOT, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotDone("it did not end within 240 seconds") from None
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode:
        failures = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        raise Failed(f"{' '.join(last)} {' '.join(failures)}")
    return " ".join(last)


# -- boxes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def box(machine: Machine, *arguments: str, **env: str) -> Iterator[Box]:
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: value for name, value in os.environ.items() if name == "PINAIVU_BACKENDS"}
        started = Box(Path(folder) / "home", *arguments, env={**kept, **env})
        try:
            yield started.start()
        finally:
            started.end()


def two_from_one(machine: Machine) -> str:
    """One GPU shown as two by the backend: the box sees two, and a model over both answers."""
    machine.needs_gpu()
    env = {} if machine.gpu_count > 1 else {"GGML_CUDA_DEVICES": "2"}
    count = sum(int(one["devices"]) for one in probe(env)["backends"])
    if count < 2:
        raise NotDone(f"the backend does not heed GGML_CUDA_DEVICES: it shows {count}")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "box.toml"
        config.write_text('[engine]\nsplit = "layer"\ntensor_split = [1.0, 1.0]\n')
        with box(machine, "--config", str(config), **env) as started:
            answer = started.chat(max_tokens=16, temperature=0)
            assert answer.status_code == 200, answer.text
            (engine,) = started.engines()
    used = engine.get("devices") or engine.get("device")
    return f"{count} devices; the engine uses {json.dumps(used)}"


def out_of_memory(machine: Machine) -> str:
    """Another program takes the memory: the box answers, on the CPU or with a 503 that says why,
    and uses the GPU when the memory is free again."""
    machine.needs_gpu()
    with memory_held() as held, box(machine, PINAIVU_KEEP_ALIVE="0") as started:
        first = started.chat(max_tokens=8)
        assert first.status_code in (200, 503), first.text
        server = started.process.poll()
        assert server is None, "the server ended"
        said = "an answer" if first.status_code == 200 else first.json()["error"]["message"]
        held.release()
        again = started.chat(max_tokens=8, keep_alive="5m")
        assert again.status_code == 200, again.text
        (engine,) = started.engines()
        used = engine["memory"]
    return f"with {held.size} taken: {said}; afterwards it has {json.dumps(used)}"


class Held:
    def __init__(self, process: subprocess.Popen[str], size: str) -> None:
        self._process, self.size = process, size

    def release(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait(60)


@contextlib.contextmanager
def memory_held() -> Iterator[Held]:
    command = [sys.executable, "-m", "tests.gpu.memory_holder", str(MEMORY_LEFT_MIB)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout
        size = process.stdout.readline().strip()
        if not size or size.startswith("0 "):
            process.kill()
            raise NotDone("the memory of the GPU could not be taken")
        held = Held(process, size)
        try:
            yield held
        finally:
            held.release()


# -- beside llama-server -------------------------------------------------------------------------


def beside_llama_server(machine: Machine) -> str:
    machine.needs_gpu()
    if not machine.llama_server:
        raise NotDone("no --llama-server was given: docs/devices.md says how it is built")
    library = Path(machine.backends[0]["path"])
    script = str(ROOT / "tests/bench/compare_llama_server")
    command = [sys.executable, script, "--gpu", "--only", STREAMS, "--pairs", "3"]
    files = ["--llama-server", str(machine.llama_server), "--model", str(machine.model)]
    # A llama-server for the CPU takes the same backend: both then compute with the same code.
    env = {"GGML_BACKEND_PATH": str(library), "LD_LIBRARY_PATH": str(library.parent)}
    try:
        done = subprocess.run(
            [*command, *files, "--results", str(machine.results)],
            env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotDone("it did not end within 300 seconds: run it alone, see its --help") from None
    if done.returncode:
        raise Failed(done.stderr.strip()[-500:])
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| 1", "| 6"))]
    missed = [row for row in rows if "**no**" in row]
    if missed or not rows:
        raise Failed(f"goals were not reached: {'; '.join(missed or ['nothing was measured'])}")
    return "; ".join(rows)


CHECKS = (
    Check("devices", "the backend is loaded, and shows GPUs", devices),
    Check("tokens", "the GPU computes what the CPU does", same_tokens),
    Check("engine", "the engine's tests on the GPU", engine_suite),
    Check("two", "a model over two devices", two_from_one),
    Check("memory", "a GPU without memory", out_of_memory),
    Check(
        "speed", "beside llama-server: 1.0, 1.3 and 2.0 at 1, 16, 64 streams", beside_llama_server
    ),
)
