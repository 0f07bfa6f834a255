"""Model files that lie: what cannot be served is named, stops nobody, and appears nowhere else."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import msgspec
import pytest

from pinaivu_box.config import Config
from pinaivu_box.doctor import models as doctor
from pinaivu_box.models import folder_scan as folders
from pinaivu_box.models import gguf
from pinaivu_box.models.gguf import read_header
from pinaivu_box.models.gguf_bytes import BadGguf
from pinaivu_box.models.layer_caches import LayerCache
from pinaivu_box.sandbox import Sandbox, SandboxLimits
from tests.support import gguf_files, mutated_headers
from tests.support.gguf_files import (
    array,
    header,
    key,
    part,
    part_name,
    put_split,
    tensor,
    u32,
    valid,
    word,
)
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import (
    MODEL,
    PINAIVU,
    UNDRAFTED,
    Box,
    environment,
)
from tests.support.sandbox_jobs import pid_of
from tests.support.vocabulary_loader import MAX_BYTES, VocabularyLoader

FAKE = "slow:1"
CONTEXT = "llama.context_length"
LLAMA = word("general.architecture", "llama")


def f32(value: float) -> bytes:
    return key(CONTEXT, 6, struct.pack("<f", value))


# Content of a file -> what the reason says.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "text": (b"This is not a model.", "does not begin with the letters GGUF"),
    "version-1": (header(version=1), "GGUF version 1"),
    "version-9": (header(version=9), "GGUF version 9"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1) + bytes(99), "big-endian"),
    "only-magic": (b"GGUF", "incomplete"),
    "many-keys": (header(key_count=2**64 - 1), "18446744073709551615 keys"),
    "many-tensors": (header(tensor_count=2**63), "9223372036854775808 tensors"),
    "more-keys-than-bytes": (header(key_count=60_000), "incomplete"),
    "no-tensors": (header(), "no tensors"),
    "no-architecture": (gguf_files.aligned(header([], [tensor("a", 0)])), "architecture"),
    "long-name": (header([struct.pack("<Q", 2**62)]), "a name of"),
    "long-string": (header([key("a", 8, struct.pack("<Q", 2**63))]), "a string of"),
    "huge-array": (header([array("a", 0, 2**63)]), "more than the file has room for"),
    "huge-floats": (header([array("a", 12, 2**61)]), "more than the file has room for"),
    "huge-strings": (header([array("a", 8, 2**40)]), "more than the file has room for"),
    "jumping-strings": (
        header([array("a", 8, 2, struct.pack("<QQ", 2**64 - 1, 1))]),
        "incomplete",
    ),
    "arrays-in-arrays": (header([array("a", 9, 1, struct.pack("<IQ", 9, 1) * 5000)]), "arrays"),
    "unknown-type": (header([key("a", 99, b"")]), "unknown type 99"),
    "unknown-array": (header([array("a", 99, 1)]), "unknown type 99"),
    "double-key": (valid(LLAMA), "general.architecture twice"),
    "double-tensor": (header([LLAMA], [tensor("a", 1), tensor("a", 1)]), "tensor a twice"),
    "escape-in-key": (valid(word("\x1b[31m", "x"), word("\x1b[31m", "y")), r"key \x1b[31m twice"),
    "nan": (valid(f32(float("nan"))), f"{CONTEXT} is nan, not a whole number"),
    "infinity": (valid(f32(float("inf"))), f"{CONTEXT} is inf"),
    "fraction": (valid(f32(2.5)), f"{CONTEXT} is 2.5"),
    "negative": (valid(key(CONTEXT, 5, struct.pack("<i", -1))), f"{CONTEXT} is -1"),
    "zero": (valid(u32(CONTEXT, 0)), f"{CONTEXT} is 0"),
    "enormous": (valid(key(CONTEXT, 10, struct.pack("<Q", 2**64 - 1))), f"{CONTEXT} is 1844"),
    "a-word": (valid(word(CONTEXT, "many")), f"{CONTEXT} is 'many'"),
    "a-truth": (valid(key(CONTEXT, 7, b"\1")), f"{CONTEXT} is True"),
    "layers": (valid(u32("llama.block_count", 2**32 - 1)), "block_count is 4294967295"),
    "heads": (valid(u32("llama.attention.head_count", 2**31)), "head_count is 2147483648"),
    "alignment": (valid(u32("general.alignment", 0)), "general.alignment is 0"),
    "alignment-3": (valid(u32("general.alignment", 3)), "no power of 2"),
    "architecture": (
        gguf_files.aligned(header([u32("general.architecture", 5)], [tensor("a", 0)])),
        "general.architecture is 5",
    ),
    "dimensions": (
        header([LLAMA], [gguf_files.text("a") + struct.pack("<I", 2**32 - 1)]),
        "4294967295 dimensions",
    ),
    "elements": (
        header([LLAMA], [gguf_files.text("a") + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0)]),
        "larger than any file",
    ),
    "good": (valid(), ""),
    "cut-off": (valid(data=4096)[:-1], "it is incomplete"),
    "offset": (header([LLAMA], [tensor("a", 1, 2**40)]), "it is incomplete"),
    "adapter": (valid(word("general.type", "adapter")), "no model but adapter"),
    "projector": (
        gguf_files.aligned(header([word("general.architecture", "clip")], [tensor("a", 0)])),
        "projector",
    ),
    "encoder": (
        gguf_files.aligned(header([LLAMA], [tensor("a", 0), tensor("v.blk.0.ffn_up.weight", 0)])),
        "encoder for images",
    ),
    "part-without-its-name": (valid(u32("split.count", 3)), "part 1 of 3"),
}
GOOD = "good"


def test_files_that_belong_to_a_model_are_no_failure_of_the_doctor(tmp_path: Path) -> None:
    """Other programs keep a projector beside its model, and that is nothing to mend."""
    (tmp_path / "models").mkdir()
    for name in ("adapter", "projector", "cut-off"):
        (tmp_path / f"models/{name}.gguf").write_bytes(HOSTILE[name][0])
    (tmp_path / "models/young.gguf").write_bytes(HOSTILE["cut-off"][0])
    os.utime(tmp_path / "models/cut-off.gguf", (1e9, 1e9))
    checks = [one for one in doctor.files(Config(), tmp_path) if "not served: " in one.found]
    assert {Path(one.found.split(": ")[1]).stem: one.state for one in checks} == {
        "adapter": "warning",
        "projector": "warning",
        "cut-off": "failed",
        "young": "warning",  # somebody may be writing it
    }


def listed(done: Any) -> dict[str, str]:
    """File name -> why it is not served, as `pinaivu ls` prints it."""
    lines = re.findall(r"^not served: (.*?): (.*)$", done.stderr, re.MULTILINE)
    return {Path(path).name: why for path, why in lines}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    made = tmp_path / "home" / "models"
    made.mkdir(parents=True)
    return made


# -- headers ---------------------------------------------------------------------------------------


def test_headers_that_lie_are_named_and_stop_no_other(models: Path) -> None:
    for name, (data, _) in HOSTILE.items():
        (models / f"{name}.gguf").write_bytes(data)
    # Much that the file has room for, and nothing in it: sparse, so it costs its maker nothing.
    for name, count in (("sparse", 2**40), ("sparse-fits", 9_000_000)):
        with (models / f"{name}.gguf").open("wb") as file:
            file.write(header([array("a", 8, count)]))
            file.truncate(80_000_000)
    done = run_command("ls", "--json", home=models.parent)
    assert [one["id"] for one in json.loads(done.stdout)] == [f"{GOOD}:latest", MODEL]
    reasons = listed(done)
    for name, (_, said) in HOSTILE.items():
        if name != GOOD:
            assert said in reasons.pop(f"{name}.gguf"), name
    assert "more than the file has room for" in reasons.pop("sparse.gguf")
    assert "more than 4,000,000 entries" in reasons.pop("sparse-fits.gguf")
    assert not reasons and "Traceback" not in done.stderr and "\x1b" not in done.stderr


def test_mutated_headers_never_harm_the_reader_nor_llama_cpp(tmp_path: Path) -> None:
    """200 of them, each in the reader's child, which lives, and in one of llama.cpp: each is a
    header with plausible values, or named."""
    file = tmp_path / "model.gguf"
    counts: dict[str, int] = {}
    limits = SandboxLimits(cpu_seconds=20.0, memory_bytes=256 * 1024 * 1024, wall_seconds=300.0)
    sandbox = Sandbox("pinaivu_box.models.header_reader:make", limits=limits)
    try:
        sandbox.start()
        child = pid_of(sandbox)
        with VocabularyLoader() as loader:
            for data in mutated_headers.mutated(200, seed=14):
                file.write_bytes(data)
                made, bad, error = msgspec.msgpack.decode(sandbox.run(os.fsencode(file)))
                assert not error and bool(made) != bool(bad)
                assert bad == bad.strip() and bad.isprintable()
                if made:
                    assert 1 <= made["context_length"] < 2**31
                    assert all(0 <= size < 2**63 for size in made["layer_bytes"])
                    assert 0 <= made["input_bytes"] + made["output_bytes"] < 2**63
                kind = re.sub(r"[^a-z ]+.*", "", bad)[:30]
                counts[kind] = counts.get(kind, 0) + 1
                loader.load(file)
            # llama.cpp may abort on a few: that ends its process, and no other.
            assert loader.deaths <= 10 and loader.peak < MAX_BYTES
        assert pid_of(sandbox) == child
    finally:
        sandbox.close()
    assert counts[""] >= 10 and len(counts) >= 8, counts  # they reach all corners of the reader


def test_the_sizes_of_tensors_are_those_of_ggml() -> None:
    lib = llama._lib
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    for kind, (block, size) in gguf.TENSOR_TYPES.items():
        assert (lib.ggml_blck_size(kind), lib.ggml_type_size(kind)) == (block, size), kind


def test_the_real_model_ends_where_its_tensors_do(tmp_path: Path) -> None:
    real = gguf_files.Real.read()
    file = tmp_path / "real.gguf"
    file.write_bytes(real.written(real.keys))
    whole = read_header(file)
    assert (whole.architecture, whole.tensors) == ("llama", len(real.tensors))
    assert (whole.context_length, whole.caches) == (8192, (LayerCache(192, 192),) * 30)
    os.truncate(file, file.stat().st_size - gguf_files.ALIGNMENT)
    with pytest.raises(BadGguf, match=r"it is incomplete: it has .* bytes, and its tensors end at"):
        read_header(file)


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize(
    "setting",
    [
        "[engine]\nstart_seconds = {}",
        "[server]\ndrain_seconds = {}",
        "[peering]\nprice_weight = {}",
        "[peering.serve]\ncopy_mb_per_s = {}",
        '[[model]]\nname = "a:1"\npath = "fake:1"\ncontext = {}',
        "[engine]\ncontext = {}",
    ],
)
def test_a_configuration_has_finite_numbers(tmp_path: Path, setting: str, value: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(setting.format(value))
    done = run_command("ls", home=home, check=False)
    assert done.returncode == 78 and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and "not valid" in done.stderr


# -- what lies in the folder -----------------------------------------------------------------------

NAMES = {
    "with space.gguf": "with space.gguf",
    "new\nline.gguf": r"new\nline.gguf",
    "\x1b[31mred.gguf": r"\x1b[31mred.gguf",
    "\u202egpj.gguf": r"\u202egpj.gguf",
    "größe.gguf": "größe.gguf",
    os.fsdecode(b"\xff\xfe.gguf"): r"\xff\xfe.gguf",
    "x" * 130 + ".gguf": "x" * 130 + ".gguf",
    ".gguf": ".gguf",
    "a:b:c.gguf": "a:b:c.gguf",
}


@contextlib.contextmanager
def things_that_are_no_files(models: Path) -> Iterator[None]:
    """Everything that can be called `x.gguf` and is no file."""
    os.mkfifo(models / "pipe.gguf")
    (models / "directory.gguf").mkdir()
    (models / "dangling.gguf").symlink_to(models / "nothing")
    (models / "loop.gguf").symlink_to(models / "loop.gguf")
    (models / "device.gguf").symlink_to("/dev/zero")
    (models / "around").symlink_to(models)
    with socket.socket(socket.AF_UNIX) as listening:
        with contextlib.chdir(models):
            listening.bind("socket.gguf")  # a longer path would have no room in its address
        yield


THINGS = {
    "pipe.gguf": "FIFO",
    "directory.gguf": "directory",
    "dangling.gguf": "a link to a file that does not exist",
    "loop.gguf": "links",
    "device.gguf": "device",
    "socket.gguf": "socket",
}


def test_names_and_things_that_are_no_models_are_listed_and_nowhere_else(
    models: Path,
) -> None:
    """At the start, by command, over HTTP and after a reload; what is beside them is served."""
    for name in NAMES:
        (models / name).write_bytes(valid())
    (models / "LOUD.GGUF").write_bytes(valid())
    deep = models / "publisher" / "repository-GGUF"
    deep.mkdir(parents=True)
    (deep / "studio.Q4_K_M.gguf").write_bytes(valid())
    (models / os.fsdecode(b"\xe9")).mkdir()
    (models / os.fsdecode(b"\xe9") / "latin.gguf").write_bytes(valid())
    with things_that_are_no_files(models):
        check_that_they_are_listed_and_nowhere_else(models)


def check_that_they_are_listed_and_nowhere_else(models: Path) -> None:
    home = models.parent
    named = {*NAMES.values(), *THINGS, "latin.gguf"}
    served = ["LOUD:latest", "studio.Q4_K_M:latest", MODEL]

    done = run_command("ls", home=home)
    assert set(listed(done)) == named
    for name, said in THINGS.items():
        assert said in listed(done)[name]
    assert all(one in done.stdout for one in served) and "pipe" not in done.stdout

    box = Box(home, "--model", f"{FAKE}=fake:0").start()
    try:
        ids = [one["id"] for one in box.http("GET", "/v1/models").json()["data"]]
        assert sorted(ids) == sorted([FAKE, *served])
        answer = box.http("GET", "/v1/admin/models").json()
        assert {Path(one["path"]).name for one in answer["not_served"]} == named
        assert [one["id"] for one in answer["data"]] == ids
        assert box.errors.count("not served:") == len(named)
        reloaded = box.http("POST", "/v1/admin/reload").json()
        assert reloaded["not_served"] == answer["not_served"]
        assert "not served: " in run_command("reload", home=home).stderr
        assert box.http("GET", "/health").status_code == 200
        assert box.http("GET", "/readyz").status_code == 200
        for name in NAMES:
            model = name.removesuffix(".gguf").encode(errors="replace").decode()
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
            asked = box.http("POST", "/v1/chat/completions", json=body)
            assert asked.status_code in (404, 422), name
        metrics = box.http("GET", "/metrics").text
        assert not any(escaped in metrics for escaped in NAMES.values())
        assert "\x1b" not in box.errors and "Traceback" not in box.errors
        plain = run_command_json("keys", "create", home=home)["key"]
        assert box.http("GET", "/v1/admin/models", key=plain).status_code == 403
        assert box.stop() == 0
    finally:
        box.end()


def test_of_two_files_with_one_id_the_first_is_served_and_the_other_named(models: Path) -> None:
    below, other = models / "a" / "repository", models / "b" / "repository"
    for where in (below, other):
        where.mkdir(parents=True)
    files = [models / "x.gguf", models / "x:latest.gguf", below / "x.gguf", models / "y.GGUF",
             models / "y.gguf", other / "z.gguf", below / "z.gguf", models / "bad.gguf",
             below / "bad.gguf"]  # fmt: skip
    for number, path in enumerate(files):
        path.write_bytes(valid(data=100 + number))
    (models / "bad.gguf").write_bytes(b"what cannot be served takes no name away")
    for _ in range(2):
        done = run_command("ls", "--json", home=models.parent)
        served = {one["id"]: Path(one["path"]) for one in json.loads(done.stdout)}
        assert served.pop(MODEL)
        assert served == {
            "x:latest": models / "x.gguf",
            "y:latest": models / "y.GGUF",
            "z:latest": below / "z.gguf",
            "bad:latest": below / "bad.gguf",
        }
        assert done.stderr.count("another file is served as x:latest already") == 2
        assert done.stderr.count("another file is served as y:latest already") == 1
        assert done.stderr.count("another file is served as z:latest already") == 1
        assert done.stderr.count("not served:") == 5


def test_in_a_narrow_terminal_no_name_is_cut_off(models: Path) -> None:
    """LM Studio's folders make long paths, of which the end says which file it is."""
    place = models / "lmstudio-community" / "Meta-Llama-3.1-8B-Instruct-GGUF"
    place.mkdir(parents=True)
    (place / "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf").write_bytes(valid())
    (place / "Meta-Llama-3.1-8B-Instruct-Q8_0.gguf").write_bytes(valid()[:-1])
    (path,) = place.glob("*Q8_0*")
    shown = (
        "from pinaivu_box.cli.render import print_checks\n"
        "from pinaivu_box.doctor.check import Check\n"
        f"found = {f'not served: {path}: it is incomplete'!r}\n"
        "print_checks([Check('models', 'failed', found, '')])"
    )
    doctor = in_terminal(sys.executable, "-c", shown)
    assert "Instruct-Q8_0.gguf:itisincomplete" in "".join(doctor.split())
    listed = in_terminal(*PINAIVU, "ls", "--home", str(models.parent))
    assert "SIZE" in listed and "OWNER" in listed
    assert "Meta-Llama-3.1-8B-Instruct-Q4_K_M:latest" in listed
    assert "Instruct-Q4_K_M.gguf" in "".join(
        listed.partition("local")[2].split("smollm2")[0].split()
    )


def in_terminal(*command: str) -> str:
    """What it prints into one of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment(COLUMNS="80")
    ):
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while more := os.read(ours, 65536):
                said += more
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_folder_is_looked_at_within_bounds(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepest = models.joinpath(*["d"] * (folders.MAX_DEPTH + 1))
    deepest.mkdir(parents=True)
    (deepest / "deep.gguf").touch()
    (deepest.parent / "high.gguf").touch()
    (models / ".partial").mkdir()
    (models / ".partial" / "unfinished.gguf").touch()
    found = folders.scan(models)
    assert [path.name for path in found.files] == ["high.gguf"]
    assert f"more than {folders.MAX_DEPTH} deep" in found.not_served[models]
    elsewhere = models.parent / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner" / "linked.gguf").touch()
    (models / "more").symlink_to(elsewhere / "inner")
    upwards: dict[Path, str | Path] = {
        models / "root": "/",
        models / "home": models.parent,
        models / "d" / "up": "..",
    }
    for link, target in upwards.items():
        link.symlink_to(target)
    (elsewhere / "inner" / "out").symlink_to(elsewhere)
    found = folders.scan(models)
    assert {path.name for path in found.files} == {"high.gguf", "linked.gguf"}
    links = {path for path, why in found.not_served.items() if "a link to a folder above" in why}
    assert links == {models / "root", models / "home", models / "more" / "out"}
    for number in range(30):
        (models / f"m{number:02}.gguf").touch()
    monkeypatch.setattr(folders, "MAX_FILES", 20)
    found = folders.scan(models)
    assert len(found.files) == 21 and "20 model files" in found.not_served[models]
    monkeypatch.setattr(folders, "MAX_ENTRIES", 10)
    found = folders.scan(models)
    assert len(found.files) <= 10 and "10 entries" in found.not_served[models]


def test_a_file_that_grows_is_served_once_it_is_whole(
    models: Path,
) -> None:
    data = valid(data=10_000)
    file = models / "growing.gguf"
    file.write_bytes(data[:5000])
    box = Box(models.parent, "--model", f"{FAKE}=fake:0").start()
    try:
        first = box.http("POST", "/v1/admin/reload").json()
        assert "growing:latest" not in first["models"]
        (named,) = first["not_served"]
        assert named["path"] == str(file) and "it is incomplete: it has 5,000" in named["reason"]
        with file.open("ab") as more:
            more.write(data[5000:])
        second = box.http("POST", "/v1/admin/reload").json()
        assert "growing:latest" in second["models"] and second["not_served"] == []
    finally:
        box.end()


# -- beside others ---------------------------------------------------------------------------------


def test_another_tenants_stream_goes_on_while_files_are_looked_at(
    models: Path,
) -> None:
    """Each of these takes the reader as long as any file can."""
    (models.parent / "config.toml").write_text(UNDRAFTED)
    box = Box(models.parent, "--model", f"{FAKE}=fake:20").start()
    try:
        other = run_command_json("keys", "create", home=box.home)["key"]
        options: Any = {"model": FAKE, "messages": [{"role": "user", "content": "hi"}]}
        with box.client_with(other).chat.completions.create(
            stream=True, max_tokens=3000, **options
        ) as stream:
            chunks = iter(stream)
            next(chunks)
            for number in range(2):
                with (models / f"heavy{number}.gguf").open("wb") as file:
                    file.write(header([array("a", 8, 3_900_000)], key_count=2))
                    file.truncate(80_000_000)
            meanwhile = 0
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                reloading = pool.submit(box.http, "POST", "/v1/admin/reload")
                while not reloading.done() and next(chunks, None) is not None:
                    meanwhile += 1
            done = reloading.result().json()
        assert len(done["not_served"]) == 2 and FAKE in done["models"]
        assert meanwhile > 10, meanwhile
    finally:
        box.end()


def test_a_model_that_cannot_be_loaded_is_tried_again_when_its_file_changes(models: Path) -> None:
    """No engine is started again and again, and others are served meanwhile.  The file that comes
    says odd things of sampling, which would go into the signed proof, where no NaN can be, has a
    template that is not UTF-8, and is of a year that SQLite has no number for."""
    file = models / "odd.gguf"
    file.write_bytes(valid())
    box = Box(models.parent, "--model", f"{FAKE}=fake:0").start()
    try:
        answer = box.chat(model="odd", max_tokens=1)
        assert answer.status_code == 503
        assert "could not be loaded" in answer.json()["error"]["message"]
        assert box.engines() == []
        assert box.chat(model=FAKE, max_tokens=1).status_code == 200

        real = gguf_files.Real.read()
        odd = {"top_p": float("inf"), "top_k": -5.0, "min_p": float("nan")}
        keys = [key(f"general.sampling.{name}", 6, struct.pack("<f", odd[name])) for name in odd]
        keys.append(word("general.sampling.temp", "hot"))
        keys.append(word("tokenizer.chat_template", b"\xff{{ messages[0].content }}"))
        replaced = (b"general.sampling", b"tokenizer.chat_template")
        own = [one for one in real.keys if not any(name in one[:99] for name in replaced)]
        file.write_bytes(real.written([*own, *keys]))
        os.utime(file, ns=(2**63 + 5, 2**63 + 5))
        assert "odd:latest" in box.http("POST", "/v1/admin/reload").json()["models"]
        answer = box.chat(model="odd", max_tokens=2)
        assert answer.status_code == 200, answer.text
        receipt = box.http("GET", f"/v1/receipts/{answer.json()['request_id']}").json()
        proof = json.loads(json.loads(receipt["signed_receipt"])["proofs"][0]["signed"])
        said = {name: float(proof["sampling"][name]) for name in ("top_p", "top_k", "min_p")}
        assert said == {"top_p": 0.95, "top_k": 40, "min_p": 0.05}
        assert float(proof["sampling"]["temperature"]) == 0.8
    finally:
        box.end()


# -- models in several files -----------------------------------------------------------------------


def test_a_split_model_is_one_model(models: Path) -> None:
    """Loaded by llama.cpp, answering as the whole file does, under a digest of all parts."""
    real = gguf_files.Real.read()
    paths = put_split(models / "publisher" / "repository", "split", real.split(3))
    (models / "whole.gguf").write_bytes(real.written(real.keys))
    digest = documented_digest(paths)

    (one,) = [
        one for one in run_command_json("ls", home=models.parent) if one["id"] == "split:latest"
    ]
    assert one["size"] == sum(path.stat().st_size for path in paths)
    assert one["files"] == [str(path) for path in paths]
    (models.parent / "config.toml").write_text(
        f'[[model]]\nname = "configured:1"\npath = "{paths[0]}"\n'
    )
    box = Box(models.parent).start()
    try:
        ids = {one["id"] for one in box.http("GET", "/v1/models").json()["data"]}
        assert ids == {"split:latest", "whole:latest", "configured:1", MODEL}
        texts = {}
        for name in ("whole:latest", "configured:1"):
            answer = box.chat(model=name, max_tokens=8, seed=1, temperature=0).json()
            texts[name] = answer["choices"][0]["message"]["content"]
            receipt = box.http("GET", f"/v1/receipts/{answer['request_id']}").json()
            named = json.loads(receipt["signed_receipt"])["model_digest"]
            assert (named == digest) == (name != "whole:latest")
        assert len(set(texts.values())) == 1

        paths[1].rename(models / "hidden")
        gone = box.http("POST", "/v1/admin/reload")
        # The configuration names it: that is the operator's mistake, and all stays as it was.
        assert gone.status_code == 422 and "part 2 of 3 is missing" in gone.text
        (models.parent / "config.toml").unlink()
        gone = box.http("POST", "/v1/admin/reload").json()
        assert "split:latest" not in gone["models"]
        (named,) = gone["not_served"]
        assert named["path"] == str(paths[0])
        assert named["reason"].startswith("it is incomplete: part 2 of 3 is missing")
        (models / "hidden").rename(paths[1])
        assert "split:latest" in box.http("POST", "/v1/admin/reload").json()["models"]
        box.stop()
    finally:
        box.end()

    checks = [
        one for one in run_command_json("doctor", home=models.parent) if one["name"] == "models"
    ]
    (found,) = [one["found"] for one in checks if one["found"].startswith("split:latest")]
    assert f"in 3 files, sha256 {digest[:16]}" in found and "as served before" in found
    times = paths[2].stat()
    with paths[2].open("r+b") as file:
        file.seek(times.st_size // 2)
        file.write(b"\xff\0\xff\0")
    os.utime(paths[2], ns=(times.st_atime_ns, times.st_mtime_ns))
    checks = json.loads(run_command("doctor", "--json", home=models.parent, check=False).stdout)
    (bad,) = [one for one in checks if one["state"] == "failed" and one["name"] == "models"]
    assert paths[2].name in bad["found"] and "is not what was served" in bad["found"]


def documented_digest(paths: list[Path]) -> str:
    """By the code in docs/receipts.md."""
    page = (Path(__file__).parent.parent / "docs" / "receipts.md").read_text()
    code = re.search(r"```python\n(# the digest of a model in several files\n.*?)```", page, re.S)
    assert code
    scope: dict[str, Any] = {"paths": paths}
    exec(code[1], scope)
    return str(scope["digest"])


def test_parts_that_contradict_their_names_are_refused(models: Path) -> None:
    put_split(models, "good", [part(1, 2), part(2, 2)])
    gap = put_split(models, "gap", [part(n, 9, tensors=9) for n in range(1, 10)])
    for path in gap[1:8]:
        path.unlink()
    put_split(models, "swapped", [part(2, 2), part(1, 2)])
    put_split(models, "counts", [part(1, 2), part(2, 2, says=(2, 3))])
    put_split(models, "tensors", [part(1, 2, tensors=7), part(2, 2, tensors=7)])
    put_split(models, "strangers", [valid(), valid()])
    put_split(models, "cut", [part(1, 2), part(2, 2)[:-1]])
    put_split(models, "garbage", [part(1, 2), b"GGUF"])
    (models / part_name("beyond", 4, 3)).write_bytes(part(1, 3))
    (models / part_name("none", 0, 0)).write_bytes(part(1, 3))
    (models / part_name("endless", 1, 99_999)).write_bytes(part(1, 9))
    (models / part_name("alone", 1, 1)).write_bytes(valid())
    (models / part_name("no name", 1, 2)).write_bytes(part(1, 2))
    put_split(models, "pipe", [part(1, 2), part(2, 2)])[1].unlink()
    os.mkfifo(models / part_name("pipe", 2, 2))
    done = run_command("ls", "--json", home=models.parent)
    assert {one["id"] for one in json.loads(done.stdout)} == {"good:latest", "alone:latest", MODEL}
    reasons = {re.sub(r"-0.*", "", name): why for name, why in listed(done).items()}
    said = {
        "gap": "parts 2, 3, 4, 5, 6, ... of 9 are missing",
        "swapped": "part 1 of 2 says that it is part 2 of 2",
        "counts": "part 2 of 2 says that it is part 2 of 3",
        "tensors": "its parts have 2 tensors, not 7",
        "strangers": "part 1 of 2 does not say that it is a part",
        "cut": "part 2 of 2: it is incomplete",
        "garbage": "part 2 of 2: it is incomplete",
        "beyond": "part 4 of 3",
        "none": "part 0 of 0",
        "endless": "99999 parts",
        "no name": "no model id",
        "pipe": "part 2 of 2: it is a FIFO",
    }
    assert set(reasons) == set(said)
    for name, words in said.items():
        assert words in reasons[name], name
    config = models.parent / "config.toml"
    refusals: list[tuple[Path | str, str]] = [
        (models / part_name("good", 2, 2), "give the path of part 1"),
        (gap[0], "are missing"),
        ("a\\u0000b.gguf", "null byte"),
        ("~nobody-of-that-name/x.gguf", "No such file"),
    ]
    for configured, words in refusals:
        config.write_text(f'[[model]]\nname = "a:1"\npath = "{configured}"\n')
        refused = run_command("ls", home=models.parent, check=False)
        assert refused.returncode == 1 and words in refused.stderr
        assert refused.stderr.count("\n") == 1
