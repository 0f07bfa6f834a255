"""Models of Ollama, LM Studio and llama.cpp are served from where they are, and nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from pinaivu_box import config as configs
from pinaivu_box.config import Config
from pinaivu_box.errors import CliError
from pinaivu_box.models import bundled, catalog_loader
from pinaivu_box.models.catalog import Catalog
from pinaivu_box.models.folder_watch import FolderWatch
from pinaivu_box.models.model_copy import copy_model
from tests.support import gguf_files, tiny_vision
from tests.support.cache_folders import put, put_hub, put_llama_cpp, put_ollama

LIBRARY = "registry.ollama.ai/library"
ONE, TWO = gguf_files.valid(data=64), gguf_files.valid(data=96)


def loaded(home: Path, *caches: str | Path) -> Catalog:
    return catalog_loader.load(Config(model_caches=tuple(map(str, caches))), home)


def ids(found: Catalog) -> set[str]:
    return {model.id for model in found.models} - {bundled.MODEL_ID}


def state(root: Path) -> dict[str, tuple[int, ...]]:
    """What would change if anything was written."""
    return {
        str(path): (facts.st_ino, facts.st_nlink, facts.st_mtime_ns, facts.st_mode)
        for path in sorted(root.rglob("*"))
        for facts in [path.lstat()]
    }


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home directory, in which no variable leads elsewhere."""
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def test_the_models_of_each_program_have_the_names_that_it_gives_them(
    user: Path, tmp_path: Path
) -> None:
    ollama = user / ".ollama/models"
    put_ollama(ollama, f"{LIBRARY}/llama3.2/1b", ONE)
    put_ollama(ollama, "registry.ollama.ai/ann/tiny/latest", ONE)
    put_ollama(ollama, "hf.co/ann/tiny-GGUF/Q4_0", ONE)
    put_ollama(ollama, "localhost:5000/lab/tiny/x", ONE)
    put(user / ".lmstudio/models/pub/Tiny-1B-GGUF/Tiny-1B-Q4_K_M.gguf", ONE)
    parts = [gguf_files.part(number, 2) for number in (1, 2)]
    gguf_files.put_split(user / ".cache/lm-studio/models/pub/Big-GGUF", "Big-Q8_0", parts)
    put_hub(user / ".cache/huggingface/hub", "ggml-org/tiny-GGUF", "tiny-q8_0.gguf", ONE)
    put_llama_cpp(user / ".cache/llama.cpp", "ann/old-GGUF", "Q4_0", "old-Q4_0.gguf", ONE)
    put(user / ".cache/llama.cpp/mine.gguf", ONE)
    before = state(user)
    found = loaded(tmp_path / "home", "ollama", "lm-studio", "llama.cpp")
    assert found.not_served == {}
    assert {model.id: model.owner for model in found.models if model.in_cache} == {
        "llama3.2:1b": "ollama",
        "ann/tiny:latest": "ollama",
        "hf.co/ann/tiny-GGUF:Q4_0": "ollama",
        "localhost_5000/lab/tiny:x": "ollama",
        "pub/Tiny-1B-GGUF:Q4_K_M": "lm-studio",
        "pub/Big-GGUF:Q8_0": "lm-studio",
        "ggml-org/tiny-GGUF:Q8_0": "llama.cpp",
        "ann/old-GGUF:Q4_0": "llama.cpp",
        "mine:latest": "llama.cpp",
    }
    assert len(found.find("pub/Big-GGUF:Q8_0").parts) == 2
    assert state(user) == before


@pytest.mark.parametrize(
    "variable, below",
    [
        ({"OLLAMA_MODELS": "X"}, ""),
        ({"LLAMA_CACHE": "X"}, ""),
        ({"HF_HUB_CACHE": "X"}, ""),
        ({"HF_HOME": "X"}, "hub"),
        ({"XDG_CACHE_HOME": "X"}, "huggingface/hub"),
    ],
)
def test_folders_are_where_the_programs_variables_say(
    user: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: Mapping[str, str],
    below: str,
) -> None:
    ((name, _),) = variable.items()
    monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    root = tmp_path / "elsewhere" / below
    put_ollama(root, f"{LIBRARY}/tiny/1b", ONE)
    put_hub(root, "ann/tiny", "tiny-Q4_0.gguf", ONE)
    program = "ollama" if name == "OLLAMA_MODELS" else "llama.cpp"
    expected = "tiny:1b" if name == "OLLAMA_MODELS" else "ann/tiny:Q4_0"
    assert ids(loaded(tmp_path / "home", program)) == {expected}


def test_a_folder_at_a_path_is_read_as_it_is_arranged(tmp_path: Path) -> None:
    put_ollama(tmp_path / "a", f"{LIBRARY}/tiny/1b", ONE)
    put_hub(tmp_path / "b", "ann/tiny", "tiny-Q4_0.gguf", ONE)
    put_llama_cpp(tmp_path / "c", "ann/old", "Q8_0", "old-Q8_0.gguf", ONE)
    put(tmp_path / "d/pub/Repo/x-F16.gguf", ONE)
    found = loaded(tmp_path / "home", *(tmp_path / letter for letter in "abcd"))
    assert ids(found) == {"tiny:1b", "ann/tiny:Q4_0", "ann/old:Q8_0", "pub/Repo:F16"}


def test_what_ollamas_layers_say_counts(tmp_path: Path) -> None:
    params = '{"temperature": 0.3, "num_ctx": 77, "stop": ["<|end|>"], "new_thing": 1}'
    layers = {"params": params, "system": "Be brief.", "license": "Be nice.", "template": "{{ x }}"}
    put_ollama(tmp_path / "o", f"{LIBRARY}/tiny/1b", ONE, **layers)
    record = loaded(tmp_path / "home", tmp_path / "o").find("tiny:1b").record
    assert record is not None
    assert (record.system, record.license) == ("Be brief.", "Be nice.")
    assert record.source == "registry.ollama.ai/library/tiny:1b"
    said = record.parameters
    assert (said.temperature, said.num_ctx, said.stop) == (0.3, 77, ("<|end|>",))


def test_projectors_are_found_among_the_blobs(tmp_path: Path) -> None:
    projector = tiny_vision.put(tmp_path / "eye").projector.read_bytes()
    put_ollama(tmp_path / "o", f"{LIBRARY}/eye/1b", ONE, projector=projector)
    put_hub(tmp_path / "h", "ann/eye", "eye-Q8_0.gguf", ONE)
    put_hub(tmp_path / "h", "ann/eye", "mmproj-eye-F16.gguf", projector)
    found = loaded(tmp_path / "home", tmp_path / "o", tmp_path / "h")
    for name in ("eye:1b", "ann/eye:Q8_0"):
        seen = found.find(name).projector
        assert seen is not None and seen.path.read_bytes() == projector


def test_one_that_is_damaged_is_named_and_stops_no_other(tmp_path: Path) -> None:
    root = tmp_path / "o"
    put_ollama(root, f"{LIBRARY}/good/1b", ONE)
    cut = put_ollama(root, f"{LIBRARY}/cut/1b", TWO)
    size = len(TWO)
    (blob,) = [path for path in (root / "blobs").iterdir() if path.stat().st_size == size]
    blob.write_bytes(TWO[:-8])
    gone = put_ollama(root, f"{LIBRARY}/gone/1b", gguf_files.valid(data=128))
    for path in (root / "blobs").iterdir():
        if path.stat().st_size > size:
            path.unlink()
    broken = put(root / "manifests" / LIBRARY / "broken/1b", '{"layers": 1}')
    large = put(root / "manifests" / LIBRARY / "large/1b", "x" * 2_000_000)
    wrong = put_ollama(root, f"{LIBRARY}/wrong/1b", ONE, params='{"temperature": 0.5}')
    layer = json.loads(wrong.read_text())["layers"][1]
    (root / "blobs" / layer["digest"].replace(":", "-")).write_text('{"temperature": 0.9}')
    adapter = put_ollama(root, f"{LIBRARY}/lora/1b", ONE, adapter="x")
    name = put_ollama(root, f"{LIBRARY}/a b/1b", ONE)
    found = loaded(tmp_path / "home", root)
    assert ids(found) == {"good:1b"}
    reasons = found.not_served
    assert "it says" in reasons.pop(cut) and "No such file" in reasons.pop(gone)
    assert "no manifest" in reasons.pop(broken) and "bytes" in reasons.pop(large)
    assert "digest" in reasons.pop(wrong) and "adapter" in reasons.pop(adapter)
    assert "no model id" in reasons.pop(name) and reasons == {}


def test_no_link_leads_out(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret/secret.gguf", ONE)
    root = tmp_path / "o"
    manifest = put_ollama(root, f"{LIBRARY}/evil/1b", ONE)
    (blob,) = (root / "blobs").iterdir()
    blob.unlink()
    blob.symlink_to(secret)
    put_ollama(tmp_path / "m", f"{LIBRARY}/x/1b", ONE)
    linked = root / "manifests/registry.ollama.ai/linked"
    linked.symlink_to(tmp_path / "m/manifests/registry.ollama.ai/library")
    studio = tmp_path / "s"
    file = studio / "pub/repo/x-Q4_0.gguf"
    file.parent.mkdir(parents=True)
    file.symlink_to(secret)
    (studio / "pub/folder").symlink_to(tmp_path / "secret")
    fifo = studio / "pub/repo/y-Q4_0.gguf"
    os.mkfifo(fifo)
    link = put_hub(tmp_path / "h", "ann/x", "x-Q4_0.gguf", ONE)
    link.unlink()
    link.symlink_to(secret)
    put(tmp_path / "h/models--ann--y/refs/main", "../../../secret")
    put(tmp_path / "h/models--ann--z/refs/main", "f" * 40)
    outside = tmp_path / "h/models--ann--z/snapshots"
    outside.mkdir()
    (outside / ("f" * 40)).symlink_to(tmp_path / "secret")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "manifests").symlink_to(tmp_path / "m/manifests")
    found = loaded(tmp_path / "home", root, studio, tmp_path / "h", moved)
    assert ids(found) == set()
    reasons = found.not_served
    for path in (manifest, file, link, tmp_path / "h/models--ann--z", moved):
        assert "leads out" in reasons[path], path
    for path in (linked, studio / "pub/folder"):
        assert "not followed" in reasons[path], path
    assert "no commit" in reasons[tmp_path / "h/models--ann--y"]
    assert "FIFO" in reasons[fifo]


def test_a_root_that_is_a_link_is_the_users_choice(tmp_path: Path) -> None:
    put_ollama(tmp_path / "disk", f"{LIBRARY}/tiny/1b", ONE)
    (tmp_path / "o").symlink_to(tmp_path / "disk")
    assert ids(loaded(tmp_path / "home", tmp_path / "o")) == {"tiny:1b"}


def test_what_the_box_has_itself_comes_first(tmp_path: Path) -> None:
    home, root = tmp_path / "home", tmp_path / "o"
    put(home / "models/tiny:1b.gguf", ONE)
    put(home / "models/same:1b.gguf", ONE)
    taken = put_ollama(root, f"{LIBRARY}/tiny/1b", TWO)
    put_ollama(root, f"{LIBRARY}/same/1b", ONE)
    found = loaded(home, root)
    assert {model.owner for model in found.models} - {"bundled"} == {"local"}
    (reason,) = found.not_served.values()
    assert "another file is served as tiny:1b already" in reason and taken.exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    found = loaded(tmp_path / "home", tmp_path / "none")
    assert found.not_served == {
        tmp_path / "none": "the models of lm-studio: there is no such folder"
    }


def test_they_are_followed_like_the_models_folder(tmp_path: Path) -> None:
    root, home = tmp_path / "o", tmp_path / "home"
    watch, caches = FolderWatch(), (str(root),)
    put_ollama(root, f"{LIBRARY}/one/1b", ONE)
    assert watch.look(home / "models", caches) is None
    manifest = put_ollama(root, f"{LIBRARY}/two/1b", TWO)
    files = watch.look(home / "models", caches)
    assert files is not None
    settings = Config(model_caches=caches)
    # The other is too young.
    assert ids(catalog_loader.load(settings, home, scan=files)) == {"one:1b"}
    files = watch.look(home / "models", caches)
    assert files is not None
    assert ids(catalog_loader.load(settings, home, scan=files)) == {"one:1b", "two:1b"}
    assert watch.look(home / "models", caches) is None
    manifest.unlink()
    files = watch.look(home / "models", caches)
    assert files is not None
    assert ids(catalog_loader.load(settings, home, scan=files)) == {"one:1b"}


def test_another_name_for_one_leaves_its_file_as_it_is(tmp_path: Path) -> None:
    root, home = tmp_path / "o", tmp_path / "home"
    put_ollama(root, f"{LIBRARY}/tiny/1b", ONE)
    before = state(root)
    (copy,) = copy_model(loaded(home, root).find("tiny:1b"), home / "models", "other:1b")
    assert state(root) == before and copy.read_bytes() == ONE
    assert {"tiny:1b", "other:1b"} <= ids(loaded(home, root))


@pytest.mark.parametrize("name", ["olama", "models", "./models"])
def test_a_name_of_no_program_is_refused(tmp_path: Path, name: str) -> None:
    file = put(tmp_path / "box.toml", f'model_caches = ["{name}"]\n')
    with pytest.raises(CliError, match="model_caches has"):
        configs.load(file, environ={})
