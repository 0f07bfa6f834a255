"""The executable that build/binary makes: alone in an empty folder without any environment, and
under the tests that the source tree passes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.support.process_box
from pinaivu_box.models import bundled
from tests.support import fake_gpu
from tests.support.process_box import MODEL, Box, alive, environment, pinaivu, wait_until
from tests.support.release_server import fake_executable, release_server
from tests.support.released_files import released
from tests.support.waiting import DEADLINE

pytestmark = [
    pytest.mark.skipif(
        "PINAIVU_BINARY" in os.environ,
        reason="the tests run on an executable that is there already",
    ),
    pytest.mark.timeout(1800),  # the first makes the executable: a minute, if nothing else runs
]

ROOT = Path(__file__).parent.parent
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}

# What an executable can break that the source tree cannot, and is not looked at above: what it
# holds, how it starts others of itself, how signals reach it.
SOURCE_TESTS = {
    "peering/test_joining.py": "does_not_run_invites or is_discovered",
    "test_backup.py": "terminal",
    "test_chat.py": "models",
    "test_crash.py": "of_the_real_model or plain_answer_under_way or second_sigterm",
    "test_doctor.py": "running_box_is_in_order",
    "test_images.py": "depends_on_the_image",
    "test_keys.py": "create_prints",
    "test_receipts.py": "needs_no_box or show",
    "test_serve.py": "first_start_prints or stdout or version",
}


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh one, away from the clone."""
    made = subprocess.run([ROOT / "build/binary", "--any-glibc"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    copy = tmp_path_factory.mktemp("executable") / "pinaivu"
    shutil.copy2(ROOT / "dist/pinaivu", copy)
    yield copy
    shutil.rmtree(copy.parent)  # pytest keeps folders of earlier runs; not 370 MB in each


def cache(executable: Path) -> str:
    """The environment of all boxes: where the program is unpacked."""
    return f"XDG_CACHE_HOME={executable.parent / 'cache'}"


@pytest.fixture
def nothing(
    executable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """From here on `pinaivu` is the executable, and knows only its arguments and its cache."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    alone = ["env", "-i", cache(executable), str(executable)]
    monkeypatch.setattr(tests.support.process_box, "PINAIVU", alone)
    yield monkeypatch
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.fixture
def box(nothing: object, tmp_path: Path) -> Iterator[Box]:
    started = Box(tmp_path / "home").start()
    yield started
    end(started)


def end(box: Box) -> None:
    if box.process.poll() is None:
        box.stop()


def ask(box: Box) -> dict[str, Any]:
    answer = box.http("POST", "/v1/chat/completions", json=REQUEST)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def engine_pid(box: Box) -> int:
    return int(box.engines()[0]["pid"])


def server_pid(box: Box) -> int:
    return int(json.loads((box.home / "run.json").read_text())["pid"])


def mappings(pid: int) -> list[tuple[str, int]]:
    """(path, size) of each file mapped into a process."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5) if line.count("/") else (line, "")
        if path:
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((path, end - start))
    return found


def unpacked(pid: int) -> Path:
    """The folder that holds the process's libraries."""
    paths = (Path(path) for path, _ in mappings(pid))
    return next(path.parents[2] for path in paths if path.name == "libllama.so")


# -- alone ---------------------------------------------------------------------------------------


def test_it_answers_plain_and_streamed(box: Box) -> None:
    assert ask(box)["choices"][0]["message"]["content"].strip()
    streamed = list(box.client.chat.completions.create(**REQUEST, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed).strip()
    assert streamed[-1].choices[0].finish_reason in ("stop", "length")


def test_it_answers_by_a_schema(box: Box) -> None:
    """What compiles grammars is in it, and all that it looks up."""
    number = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    schema = {**number, "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    body = {**REQUEST, "max_tokens": 64, "response_format": wanted}
    answer = box.http("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) == {"n": 7}


def test_it_verifies_the_receipt_of_its_answer(box: Box, tmp_path: Path) -> None:
    answer = ask(box)
    receipt = box.http("GET", f"/v1/receipts/{answer['request_id']}").json()
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    (tmp_path / "answer.txt").write_text(answer["choices"][0]["message"]["content"])
    options = [
        *("--node-key", receipt["node_id"].removeprefix("node_")),
        *("--request", str(tmp_path / "request.json")),
        *("--answer", str(tmp_path / "answer.txt")),
    ]
    verify = ["receipts", "verify", str(tmp_path / "receipt.json"), *options]
    pinaivu(*verify, home=tmp_path / "other")

    receipt["signed_receipt"] = receipt["signed_receipt"].replace(MODEL, "other:1b")
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    assert pinaivu(*verify, home=tmp_path / "other", check=False).returncode == 1


def test_the_weights_are_mapped_from_the_executable_itself(box: Box, executable: Path) -> None:
    ask(box)
    model = bundled.read_footer(executable)
    assert model is not None
    engine = engine_pid(box)
    mapped = sum(size for path, size in mappings(engine) if path == str(executable))
    assert mapped > 0.95 * model.size
    for folder in (unpacked(engine), box.home):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        assert all(path.stat().st_size < model.size / 2 for path in files)
        for path in files:
            with path.open("rb") as file:
                assert file.read(4) != b"GGUF", path


def test_it_is_unpacked_once_and_leaves_no_temporary_files(box: Box, executable: Path) -> None:
    ask(box)
    folder = unpacked(engine_pid(box))
    assert folder.parent == executable.parent / "cache/pinaivu"
    assert Path(f"/proc/{box.process.pid}/exe").readlink() == folder / "pinaivu"
    before = folder.stat().st_ino
    assert box.stop() == 0
    box.start()
    ask(box)
    assert (unpacked(engine_pid(box)), folder.stat().st_ino) == (folder, before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_it_is_one_process_and_its_engines(box: Box) -> None:
    """So a service manager sees the server itself, and reaches it with its signals."""
    assert server_pid(box) == box.process.pid


def test_a_kill_leaves_no_process_and_the_next_start_goes_on(box: Box) -> None:
    ask(box)
    engine, folder = engine_pid(box), unpacked(engine_pid(box))
    box.kill()
    wait_until(lambda: not alive(engine), "the end of the engine")
    box.start()
    ask(box)
    assert unpacked(engine_pid(box)) == folder


def test_an_executable_that_was_replaced_starts_no_engine_of_its_other_version(
    executable: Path, tmp_path: Path, nothing: pytest.MonkeyPatch
) -> None:
    """The receipts would name the model of the old one."""
    mine = tmp_path / "pinaivu"
    shutil.copy2(executable, mine)
    nothing.setattr(
        tests.support.process_box, "PINAIVU", ["env", "-i", cache(executable), str(mine)]
    )
    box = Box(tmp_path / "home").start()
    try:
        ask(box)
        engine = engine_pid(box)
        (tmp_path / "new").write_bytes(mine.read_bytes())
        (tmp_path / "new").chmod(0o755)
        (tmp_path / "new").replace(mine)
        ask(box)  # by the engine that is there, and a sandbox, which large bodies are read in
        long = {**REQUEST, "x_padding": "x" * 100_000}
        assert box.http("POST", "/v1/chat/completions", json=long).status_code == 200
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: not alive(engine), "the end of the engine")
        answer = box.http("POST", "/v1/chat/completions", json=REQUEST)
        assert answer.status_code == 503
        assert "was replaced" in answer.json()["error"]["message"]
        assert box.stop() == 0
        box.start()
        ask(box)
    finally:
        end(box)
        mine.unlink()


def test_a_signal_to_the_whole_group_drains(
    nothing: pytest.MonkeyPatch, executable: Path, tmp_path: Path
) -> None:
    """Ctrl-C on a terminal and `systemctl stop` reach every process at once."""
    slow = Box(tmp_path / "slow", "--model", "slow:1=fake:20")
    nothing.setattr(
        tests.support.process_box,
        "PINAIVU",
        ["setsid", "env", "-i", cache(executable), str(executable)],
    )
    slow.start()
    try:
        body = {**REQUEST, "model": "slow:1", "max_tokens": 60}
        stream = slow.client.chat.completions.create(**body, stream=True)
        next(iter(stream))
        os.killpg(os.getpgid(slow.process.pid), signal.SIGINT)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert slow.process.wait(DEADLINE) == 0
    finally:
        end(slow)


def test_it_says_what_is_in_it(executable: Path, nothing: object) -> None:
    """What it was made of, not what is installed."""
    listed = json.loads(pinaivu("licenses", "--json", home=None).stdout)
    found = {one["name"]: one for one in listed}
    assert {
        "Python",
        "pinaivu-box",
        "llama.cpp",
        "starlette",
        "OpenSSL",
        "SQLite",
        "libstdc++",
    } <= {*found}
    assert found["PyInstaller"]["license"] == "GPL-2.0-or-later WITH Bootloader-exception"
    assert not {"pytest", "mypy", "hypothesis", "pip", "setuptools"} & set(found)
    assert "commit" in found["llama.cpp"]["source"] or found["llama.cpp"]["version"]
    full = json.loads(pinaivu("licenses", "--json", "--full", home=None).stdout)
    assert [one["name"] for one in full if not one["license"] or not one["texts"]] == []


def test_it_replaces_itself_by_a_newer_release(
    executable: Path, nothing: object, tmp_path: Path
) -> None:
    """A copy of it, which has the key of the release server."""
    pinaivu("--version", home=None)
    (unpacked,) = (executable.parent / "cache/pinaivu").glob("program-*")
    program, mine = tmp_path / "program", tmp_path / "bin/pinaivu"
    shutil.copytree(unpacked, program, copy_function=os.link, symlinks=True)
    key = program / "pinaivu_box/release/public_key.pem"
    key.unlink(missing_ok=True)
    mine.parent.mkdir()
    shutil.copy2(executable, mine)
    with release_server(tmp_path / "server") as server:
        server.release("9.8.7")
        key.write_bytes(server.public_key)
        done = subprocess.run(
            [program / "pinaivu", "update", "--apply"],
            env={"PINAIVU_LAUNCHED": f"0::{mine}", "PINAIVU_RELEASES": server.url},
            capture_output=True, text=True,
        )  # fmt: skip
    shutil.rmtree(program)
    assert done.returncode == 0, done.stderr
    assert mine.read_bytes() == fake_executable("9.8.7")
    previous = mine.with_name("pinaivu.previous")
    assert previous.stat().st_size == executable.stat().st_size
    alone = ["env", "-i", cache(executable), str(previous), "--version"]
    assert subprocess.run(alone, capture_output=True).stdout.startswith(b"pinaivu, version")
    previous.unlink()


def test_it_knows_where_releases_are_and_verifies_them(
    executable: Path, nothing: object, tmp_path: Path
) -> None:
    release = released(tmp_path / "release", {"pinaivu-1.2.3-linux-x86_64": b"program"})
    (tmp_path / "key.pem").write_bytes(release.public_key)
    file = str(release.folder / "pinaivu-1.2.3-linux-x86_64")
    pinaivu("verify-release", file, "--key", str(tmp_path / "key.pem"), home=None)
    (folder,) = (executable.parent / "cache/pinaivu").glob("program-*")
    assert (folder / "pyproject.toml").is_file()
    assert (folder / "pinaivu_box/release/components.json.gz").is_file()


@pytest.mark.skipif(
    [int(part) for part in (os.confstr("CS_GNU_LIBC_VERSION") or "9.9").split()[-1].split(".")]
    > [2, 36],
    reason="libraries of this system may need a newer glibc than a release",
)
def test_a_release_can_be_built_here(executable: Path) -> None:
    """It runs where glibc is 2.35, as on Ubuntu 22.04."""
    need = subprocess.run(
        [sys.executable, ROOT / "build/baseline.py", executable],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert (2, 28) <= (int(need[0]), int(need[1])) <= (2, 35)


# -- with a payload ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_payload(executable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The executable with a backend in a payload, as `build/binary --cuda` makes it: here the one
    for fake GPUs, since nothing else can be made in time or used here."""
    folder = tmp_path_factory.mktemp("payload")
    copy, payload = folder / "pinaivu-cuda", folder / "cuda.payload"
    shutil.copy2(executable, copy)
    model = Path(sys.prefix) / "share/pinaivu/models" / bundled.FILE_NAME
    for arguments in (
        ("make", payload, "cuda", fake_gpu.backend()),
        ("assemble", copy, model, payload),
    ):
        script = [sys.executable, str(ROOT / "build/payloads.py"), *map(str, arguments)]
        subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    yield copy
    copy.unlink()


@pytest.fixture
def start_with_payload(
    with_payload: Path, tmp_path: Path, nothing: pytest.MonkeyPatch
) -> Iterator[Callable[..., Box]]:
    """Starts a box of that executable, whose environment is a cache folder and what is given."""
    started: list[Box] = []

    def start(**env: str) -> Box:
        variables = [f"{name}={value}" for name, value in env.items()]
        places = [f"XDG_CACHE_HOME={tmp_path}", f"TMPDIR={tmp_path}"]
        command = ["env", "-i", *places, *variables, str(with_payload)]
        nothing.setattr(tests.support.process_box, "PINAIVU", command)
        started.append(Box(tmp_path / f"home{len(started)}").start())
        return started[-1]

    yield start
    for box in started:
        end(box)
    for folder in tmp_path.glob("pinaivu*/program-*"):  # 180 MB, which pytest would keep
        shutil.rmtree(folder)


def unpacked_backend(folder: Path) -> Path:
    (library,) = folder.glob("pinaivu/backends/cuda-*/libggml-cuda.so")
    return library


def test_a_payload_without_a_gpu_steps_aside(
    start_with_payload: Callable[..., Box], tmp_path: Path
) -> None:
    box = start_with_payload()
    assert "no GPU" in box.output or "pinaivu doctor" in box.output  # the second: there is a card
    assert ask(box)["choices"][0]["message"]["content"].strip()
    assert "Fake GPU" not in box.engines()[0]["device"]
    assert unpacked_backend(tmp_path)


def test_a_payload_is_unpacked_once_and_computes_on_gpus(
    start_with_payload: Callable[..., Box], tmp_path: Path
) -> None:
    box = start_with_payload(FAKE_GPUS="CUDA0:1024")
    assert "CUDA0 Fake GPU" in box.output
    ask(box)
    assert "Fake GPU" in box.engines()[0]["device"]
    before = unpacked_backend(tmp_path).stat()
    second = start_with_payload(FAKE_GPUS="CUDA0:1024")
    ask(second)
    assert unpacked_backend(tmp_path).stat().st_ino == before.st_ino


def test_a_damaged_payload_in_the_cache_is_unpacked_again(
    start_with_payload: Callable[..., Box], tmp_path: Path
) -> None:
    ask(start_with_payload())
    library = unpacked_backend(tmp_path)
    whole = library.read_bytes()
    library.chmod(0o700)
    library.write_bytes(whole[:100] + os.urandom(len(whole) - 100))
    box = start_with_payload(FAKE_GPUS="CUDA0:1024")
    ask(box)
    assert "Fake GPU" in box.engines()[0]["device"]
    assert unpacked_backend(tmp_path).read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_the_gpu_only(
    start_with_payload: Callable[..., Box], tmp_path: Path
) -> None:
    (tmp_path / "pinaivu").write_text("")
    box = start_with_payload(FAKE_GPUS="CUDA0:1024")
    ask(box)
    assert "Fake GPU" not in box.engines()[0]["device"]


# -- as the source tree --------------------------------------------------------------------------


def test_the_executable_passes_tests_of_the_source_tree(executable: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    chosen = [f"({Path(file).stem} and ({words}))" for file, words in SOURCE_TESTS.items()]
    options = ["-v", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "pytest")]
    files = [str(ROOT / "tests" / file) for file in SOURCE_TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "-k", " or ".join(chosen)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(
            PINAIVU_BINARY=str(executable),
            TMPDIR=str(scratch),
            XDG_CACHE_HOME=str(executable.parent / "cache"),
        ),
    )
    assert done.returncode == 0, done.stdout
    for file in SOURCE_TESTS:
        assert re.search(rf"^tests/{file}::\S+ PASSED", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout
