"""What comes into the models folder of a running box, and goes from there, without a reload."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pinaivu_box.cli.banner import banner
from pinaivu_box.models import bundled, folder_watch
from pinaivu_box.models.folder_watch import FolderWatch
from tests.support.gguf_files import part, put_split, valid
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, wait_until

FAKE = "fake:1"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Each test has a folder of its own in its models folder.  With peering, the digests of files
    matter to each request, too."""
    home = tmp_path_factory.mktemp("new") / "home"
    (home / "models").mkdir(parents=True)
    config = f'[peering]\nenabled = true\nport = 0\n[[model]]\nname = "{FAKE}"\npath = "fake:0"\n'
    (home / "config.toml").write_text(config)
    started = Box(home).start()
    yield started
    started.end()


@pytest.fixture
def place(box: Box, request: pytest.FixtureRequest) -> Path:
    made = box.home / "models" / str(request.node.name)
    made.mkdir()
    return made


def served(box: Box) -> set[str]:
    return {one["id"] for one in box.http("GET", "/v1/models").json()["data"]}


def await_served(box: Box, *ids: str, but: tuple[str, ...] = ()) -> None:
    wait_until(
        lambda: set(ids) <= served(box) and not served(box) & set(but), f"{ids} without {but}"
    )


def not_served(box: Box) -> dict[str, str]:
    answer = box.http("GET", "/v1/admin/models").json()
    return {Path(one["path"]).name: one["reason"] for one in answer["not_served"]}


def put(place: Path, name: str) -> Path:
    """A whole file at once, as a rename does it."""
    written = place / f"{name}.part"
    written.write_bytes(valid())
    return written.rename(place / f"{name}.gguf")


def let_it_look(box: Box, place: Path) -> None:
    """It has looked twice at all that is there: a file that came later is served."""
    name = f"marker{time.monotonic_ns()}"
    put(place, name)
    await_served(box, f"{name}:latest")


def logged(box: Box, name: str) -> list[str]:
    """What it says of a model's file; the first key has a name, too."""
    return [line for line in box.errors.splitlines() if re.search(rf"\b{name}[:.]", line)]


def test_a_file_is_served_once_it_is_written(box: Box, place: Path) -> None:
    """Not while only a half of it is here, however long that lasts; and nothing says meanwhile that
    it is broken."""
    data = valid(data=10_000)
    file = place / "slow-copy.gguf"
    for size in (0, 4, 60, 5000):
        with file.open("ab") as growing:
            growing.write(data[growing.tell() : size])
        let_it_look(box, place)
        assert "slow-copy:latest" not in served(box)
        os.utime(file)
        assert not_served(box)["slow-copy.gguf"].endswith("it was written to a moment ago")
    assert logged(box, "slow-copy") == []
    checks = json.loads(run_command("doctor", "--json", home=box.home, check=False).stdout)
    (check,) = [one for one in checks if "slow-copy" in one["found"]]
    assert check["state"] == "warning" and "being written" in check["todo"]

    with file.open("ab") as growing:
        growing.write(data[5000:])
    await_served(box, "slow-copy:latest")
    assert "slow-copy.gguf" not in not_served(box)
    assert "slow-copy:latest" in {one["id"] for one in run_command_json("ls", home=box.home)}
    (line,) = logged(box, "slow-copy")
    assert "serving slow-copy:latest" in line


def test_a_file_of_its_full_size_waits_for_aria2(box: Box, place: Path) -> None:
    (place / "torn.gguf.aria2").touch()
    (place / "torn.gguf").write_bytes(valid())
    let_it_look(box, place)
    assert "torn:latest" not in served(box)
    (place / "torn.gguf.aria2").unlink()
    await_served(box, "torn:latest")


def test_files_are_renamed_replaced_and_removed(box: Box, place: Path) -> None:
    file = put(place, "first")
    await_served(box, "first:latest")
    file = file.rename(place / "second.gguf")
    await_served(box, "second:latest", but=("first:latest",))
    wait_until(lambda: logged(box, "first")[1:], "the log to say it")
    assert "first:latest is gone" in logged(box, "first")[1]

    before = catalog_size(box, "second:latest")
    replacing = place / "download"
    replacing.write_bytes(valid(data=4096))
    replacing.rename(file)
    wait_until(lambda: catalog_size(box, "second:latest") > before, "the other file")
    assert len(logged(box, "second")) == 2  # each time that it was served
    file.write_bytes(b"no model")
    wait_until(lambda: logged(box, "second")[3:], "the log to say what is wrong")
    assert "second:latest" not in served(box)
    assert "does not begin with the letters GGUF" in not_served(box)["second.gguf"]
    file.unlink()
    wait_until(lambda: "second.gguf" not in not_served(box), "the file to be forgotten")


def catalog_size(box: Box, model_id: str) -> int:
    data = box.http("GET", "/v1/admin/models").json()["data"]
    return int(next(one["size"] for one in data if one["id"] == model_id))


def test_a_file_that_is_touched_is_served_all_the_time(box: Box, place: Path) -> None:
    file = put(place, "touched")
    await_served(box, "touched:latest")
    for _ in range(3):
        os.utime(file)
        let_it_look(box, place)
        assert "touched:latest" in served(box)
    assert not any("gone" in line for line in logged(box, "touched"))


def test_the_parts_of_a_model_are_served_together(box: Box, place: Path) -> None:
    first, second = put_split(place / "split", "parts", [part(1, 2), part(2, 2)])
    second.rename(hidden := place / "hidden")
    let_it_look(box, place)
    assert "parts:latest" not in served(box)
    assert "part 2 of 2 is missing" in not_served(box)[first.name]
    assert logged(box, "parts") == []
    hidden.rename(second)
    await_served(box, "parts:latest")
    second.unlink()
    wait_until(lambda: "parts:latest" not in served(box), "the model to be gone")


def test_an_entry_that_is_no_file_is_named_and_delays_nothing(box: Box, place: Path) -> None:
    os.mkfifo(place / "pipe.gguf")
    (place / "nowhere.gguf").symlink_to(place / "nothing")
    wait_until(lambda: logged(box, "pipe") and logged(box, "nowhere"), "the log to name them")
    let_it_look(box, place)
    (line,) = logged(box, "pipe")
    assert "not served: " in line and "it is a FIFO" in line
    assert "link to a file that does not exist" in not_served(box)["nowhere.gguf"]
    assert "Traceback" not in box.errors


def test_a_loaded_model_whose_file_is_gone_is_served_until_it_is_unloaded(
    box: Box, place: Path
) -> None:
    where = bundled.find()
    assert where is not None
    file = place / "loaded.gguf"
    file.symlink_to(where.path)
    await_served(box, "loaded:latest")
    assert box.chat(model="loaded", max_tokens=1).status_code == 200
    file.unlink()
    let_it_look(box, place)
    assert "loaded:latest" in served(box)
    assert box.chat(model="loaded", max_tokens=1, keep_alive=0).status_code == 200
    wait_until(lambda: "loaded:latest" not in served(box), "the model to be gone")
    assert box.chat(model="loaded", max_tokens=1).status_code == 404
    assert box.engines() == []


def test_only_the_folder_is_read_again(box: Box, place: Path) -> None:
    """Neither a changed configuration nor a broken one does anything before the reload."""
    config = box.home / "config.toml"
    text = config.read_text()
    try:
        config.write_text("[server\n")
        let_it_look(box, place)
        config.write_text(f'{text}\n[[model]]\nname = "other:1"\npath = "fake:0"\n')
        let_it_look(box, place)
        assert "other:1" not in served(box) and FAKE in served(box)
        assert "other:1" in box.http("POST", "/v1/admin/reload").json()["models"]
    finally:
        config.write_text(text)
        box.http("POST", "/v1/admin/reload")


def test_a_watch_tells_of_changes_alone(tmp_path: Path) -> None:
    """And a file that was written to since the look before is not among them."""
    (tmp_path / "a.gguf").write_bytes(valid())
    watch = FolderWatch()
    assert watch.look(tmp_path) is None
    first = watch.look(tmp_path)
    assert first is not None and [one.name for one in first.files] == ["a.gguf"]
    assert watch.look(tmp_path) is None
    (tmp_path / "b.gguf").write_bytes(valid()[:-1])
    second = watch.look(tmp_path)
    assert second is not None and [one.name for one in second.files] == ["a.gguf"]
    assert list(second.not_served) == [tmp_path / "b.gguf"]
    with (tmp_path / "b.gguf").open("ab") as more:
        more.write(b"\0")
    assert watch.look(tmp_path) is None
    third = watch.look(tmp_path)
    assert third is not None and len(third.files) == 2


def test_a_large_folder_takes_a_small_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = FolderWatch()
    clock = SimpleNamespace(monotonic=iter((100.0, 101.0)).__next__)
    monkeypatch.setattr(folder_watch, "time", clock)
    watch.look(tmp_path)
    assert watch.seconds >= 100


@pytest.mark.parametrize("count", [1, 9, 100, 10_000])
def test_the_banner_names_the_models_that_fit_some_lines(count: int) -> None:
    names = [f"model-{number}:latest" for number in range(count)]
    shown = banner("http://localhost:4001", Path("/home"), names, None)
    models = shown.split("  Models    ")[1].split("\n  Home")[0]
    lines = models.splitlines()
    assert len(lines) <= 5 and all(len(line) <= 80 - 12 + 12 for line in lines)
    listed = re.findall(r"model-\d+:latest", models)
    assert listed == names[: len(listed)]
    more = re.search(r"and (\d+) more \('pinaivu ls'", models)
    assert count - len(listed) == (int(more[1]) if more else 0)
