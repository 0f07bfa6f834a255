"""What the build decides before it compiles a backend for GPUs, and what it makes around one."""

from __future__ import annotations

import base64
import hashlib
import importlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import fake_gpu
from tests.support.paths import ROOT

BUILD = ROOT / "build"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of build/, which is no package."""
    monkeypatch.syspath_prepend(str(BUILD))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BUILD / f"{name}.py").exists():
            del sys.modules[name]


def test_options_come_first_and_the_rest_is_the_programs(
    script: Callable[[str], ModuleType],
) -> None:
    gpu = script("gpu")
    for arguments, kind, architectures, rest in [
        ([], "", "", []),
        (["--cuda"], "cuda", "", []),
        (["--cuda", "--arch", "80;90", "serve", "--port", "1"], "cuda", "80;90", ["serve"]),
        (["--cuda", "--arch=all"], "cuda", "all", []),
        (["--vulkan", "keys", "ls"], "vulkan", "", ["keys"]),
        (["--cuda", "--version"], "cuda", "", ["--version"]),
        (["serve", "--cuda"], "", "", ["serve"]),
    ]:
        choice, left = gpu.read_options(arguments)
        assert (choice.kind, choice.architectures, left[:1]) == (kind, architectures, rest)


def test_architectures_are_those_of_the_gpus_here_or_for_any(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = script("cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda.architectures("") == "75-virtual"
    query = tmp_path / "nvidia-smi"
    query.write_text("#!/bin/sh\necho 8.6; echo 12.0; echo 8.6\n")
    query.chmod(0o755)
    assert cuda.architectures("") == "120-real;86-real"
    assert cuda.architectures("80,90-real") == "80;90-real"
    query.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert cuda.architectures("") == "75-virtual"
    for wrong in ("70", "sm_86", "86;"):
        with pytest.raises(script("common").Stop):
            cuda.architectures(wrong)


def test_times_are_what_was_measured(script: Callable[[str], ModuleType]) -> None:
    cuda = script("cuda")
    for chosen, measured in [
        ("75-virtual", 41),
        ("90-real", 65),
        ("80-real;90-real", 112),
        ("75-real;80-real;86-real;89-real;90-real", 240),
        ("75-real;80-real;86-real;89-real;90-real;120a-real", 290),
    ]:
        assert abs(cuda.minutes(chosen) - measured) <= 0.05 * measured


def test_a_toolkit_counts_only_if_it_has_cublas(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine itself has."""
    cuda = script("cuda")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    for path in ("bin/nvcc", "include/cublas_v2.h"):
        assert cuda.on_this_machine() != tmp_path
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert cuda.on_this_machine() != tmp_path
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcublas.so").touch()
    assert cuda.on_this_machine() == tmp_path


def test_a_backend_is_kept_by_all_that_it_depends_on(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    backend = script("ggml_backend")
    recipes = [
        backend.Recipe("cuda", ("-DA=1",), "13.0.88", 41),
        backend.Recipe("cuda", ("-DA=2",), "13.0.88", 41),
        backend.Recipe("cuda", ("-DA=1",), "13.1.0", 41),
        backend.Recipe("vulkan", ("-DA=1",), "13.0.88", 41),
    ]
    folders = {recipe.folder(tmp_path) for recipe in recipes}
    assert len(folders) == 4
    assert all(script("common").source_key() in folder.name for folder in folders)


def test_the_patch_is_of_the_wheel_alone(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another patch makes another wheel, and leaves backends for GPUs as they are: it changes no
    file that they are compiled from."""
    common, patching = script("common"), script("patching")
    kept = common.llama_key(), common.source_key()
    other = tmp_path / "llama.patch"
    other.write_bytes(common.LLAMA_PATCH.read_bytes() + b"\n")
    changed = patching.changed_files(common.LLAMA_PATCH)
    assert changed and all(name.startswith(("ggml/src/ggml-cpu/", "src/")) for name in changed)
    monkeypatch.setattr(common, "LLAMA_PATCH", other)
    assert common.llama_key() != kept[0] and common.source_key() == kept[1]


def test_a_backend_that_is_in_the_cache_is_not_compiled(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    backend = script("ggml_backend")
    recipe = backend.Recipe("cuda", (), "13.0.88", 41)
    recipe.folder(tmp_path).mkdir()
    assert backend.backend(tmp_path, recipe) == recipe.folder(tmp_path)


def test_a_stand_in_has_the_functions_that_are_taken_and_no_others(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    backend = script("ggml_backend")
    code = "int cublasCreate_v2(void) { return 0; } int cublasOther(void) { return 0; }"
    versions = tmp_path / "versions"
    versions.write_text("libcublas.so.13 { global: *; };")
    real = tmp_path / "libcublas.so.13"
    compile_library(real, code, f"-Wl,--version-script={versions}")
    library = tmp_path / "libggml-cuda.so"
    compile_library(library, "int cublasCreate_v2(void); int f(void) { return cublasCreate_v2(); }",
                    str(real))  # fmt: skip
    backend.make_stand_ins(tmp_path, library, ("libcublas.so",))
    made = subprocess.run(
        ["nm", "-D", "--defined-only", tmp_path / "stand-in/libcublas.so.13"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "cublasCreate_v2@@libcublas.so.13" in made and "cublasOther" not in made


def compile_library(path: Path, code: str, *more: str) -> None:
    command = [*fake_gpu.compiler("cc", "gcc", "clang"), "-shared", "-fPIC", "-x", "c", "-"]
    options = [f"-Wl,-soname,{path.name}", "-o", str(path), "-x", "none", *more]
    subprocess.run([*command, *options], input=code, text=True, check=True)


def test_a_wheel_gets_a_backend_with_its_record(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    plain, whole, folder = tmp_path / "plain.whl", tmp_path / "whole.whl", tmp_path / "backend"
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("llama_cpp/lib/libllama.so", b"x")
        archive.writestr("llama_cpp-1.dist-info/RECORD", "llama_cpp/lib/libllama.so,sha256=a,1\n")
    (folder / "stand-in").mkdir(parents=True)
    (folder / "libggml-cuda.so").write_bytes(b"cuda")
    (folder / "stand-in/libcublas.so.13").write_bytes(b"none")
    script("llama").with_backend(plain, folder, whole)
    with zipfile.ZipFile(whole) as archive:
        lines = archive.read("llama_cpp-1.dist-info/RECORD").decode().splitlines()
        assert archive.read("llama_cpp/lib/stand-in/libcublas.so.13") == b"none"
        assert set(archive.namelist()) - {"llama_cpp-1.dist-info/RECORD"} == {
            line.split(",")[0] for line in lines
        }
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"cuda").digest()).rstrip(b"=").decode()
    assert f"llama_cpp/lib/libggml-cuda.so,sha256={digest},4" in lines


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("binary", ["--now"], "build/binary does not know '--now'"),
        ("wheel", ["80;86"], "build/wheel does not know '80;86'"),
        ("binary", ["--cuda", "--arch", "52"], "CUDA 13 knows no GPUs older than Turing"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    script: Callable[[str], ModuleType], command: str, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(script("common").Stop, match=sentence):
        script("tasks").RUN[command](arguments)


def test_vulkan_without_its_tools_says_what_to_install(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(script("common").Stop, match="apt install glslc libvulkan-dev"):
        script("vulkan").made(tmp_path)
