"""Models with adapters and with draft models: what the configuration may say, and their digests."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box import config as configs
from pinaivu_box.config import Config, EngineConfig
from pinaivu_box.doctor import models as doctor
from pinaivu_box.engine.messages import CPU, Adapter, DraftFiles
from pinaivu_box.errors import CliError
from pinaivu_box.files.store import Digests
from pinaivu_box.files.upload import FileServer
from pinaivu_box.files.wire import FileRefused, Find
from pinaivu_box.gateway.layouts import Division, Sizes
from pinaivu_box.gateway.model_needs import ModelNeeds, load_of, rules_of
from pinaivu_box.models import catalog as catalogs
from pinaivu_box.models import catalog_loader
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.store.database import Database
from tests.support import lora_files
from tests.support.gguf_files import u32, valid
from tests.support.lora_files import low_rank
from tests.support.model_copies import CopyNetwork, asked
from tests.support.paths import ROOT

pytestmark = pytest.mark.anyio
PAIR = {"blk.0.attn_q.weight": low_rank((64, 64))}
ADAPTER = lora_files.adapter(PAIR)
BASE = valid(u32("llama.block_count", 2), u32("llama.embedding_length", 64), data=4096)


class Folder:
    """A box's home with a configuration."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.models = home / "models"
        self.models.mkdir()
        self.base = self.write("base.gguf", BASE)
        self.adapter = self.write("lora.gguf", ADAPTER)

    def write(self, name: str, data: bytes) -> Path:
        path = self.home / name
        path.write_bytes(data)
        return path

    def read(self, text: str) -> Config:
        return configs.load(self.write("box.toml", text.encode()), environ={})

    def catalog(self, text: str) -> Catalog:
        return catalog_loader.load(self.read(text), self.home)

    def with_adapters(self, *adapters: str, more: str = "") -> Catalog:
        return self.catalog(
            f'[[model]]\nname = "own:1"\npath = "{self.base}"\n'
            f"adapters = [{', '.join(adapters)}]\n{more}"
        )

    def lora(self, scale: float = 1.0, path: Path | None = None) -> str:
        return f'{{ path = "{path or self.adapter}", scale = {scale} }}'


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def documented(base: str, adapters: list[tuple[Path, float]]) -> str:
    """By the code in docs/receipts.md."""
    page = (ROOT / "docs" / "receipts.md").read_text()
    code = re.search(r"```python\n(# the digest of a model with adapters\n.*?)```", page, re.S)
    assert code
    scope: dict[str, Any] = {"base": base, "adapters": adapters}
    exec(code[1], scope)
    return str(scope["digest"])


def digest(catalog: Catalog, name: str = "own:1") -> str:
    return catalogs.digest_of(catalog.find(name))


async def test_the_digest_covers_the_base_the_adapters_and_their_scales(folder: Folder) -> None:
    base = hashlib.sha256(BASE).hexdigest()
    other = folder.write("other.gguf", lora_files.adapter({"blk.1.x": low_rank((64, 64), 2)}))
    one, two = folder.lora(0.5), folder.lora(1, other)
    assert digest(folder.with_adapters()) == base
    found = digest(folder.with_adapters(one, two))
    assert found == documented(base, [(folder.adapter, 0.5), (other, 1.0)])
    different = {
        base,
        found,
        digest(folder.with_adapters(one)),
        digest(folder.with_adapters(two, one)),
        digest(folder.with_adapters(folder.lora(0.25), two)),
        digest(folder.with_adapters(folder.lora(0.0))),
        digest(folder.with_adapters(one, one)),
    }
    assert len(different) == 7
    zero = digest(folder.with_adapters(folder.lora(0.0)))
    assert digest(folder.with_adapters(folder.lora(-0.0))) == zero


async def test_the_box_keeps_the_digests_of_a_model_with_adapters(folder: Folder) -> None:
    """And reads again a file that was replaced."""
    model = folder.with_adapters(folder.lora(0.5)).find("own:1")
    database = Database(folder.home / "pinaivu.db")
    await database.open()
    digests = Digests(database)
    try:
        assert await digests.known(model) == ""
        first = await digests.of(model)
        assert first == catalogs.digest_of(model) == await digests.known(model)
        folder.adapter.write_bytes(ADAPTER[:-4] + bytes(4))
        second = await digests.of(model)
        assert second == catalogs.digest_of(model) != first
        folder.adapter.unlink()
        with pytest.raises(OSError, match=r"lora\.gguf"):
            await digests.of(model)
    finally:
        await digests.close()
        await database.close()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (BASE, "it is no adapter but model"),
        (
            lora_files.adapter(PAIR, architecture="qwen3"),
            "it is for qwen3 models .* is llama",
        ),
        (lora_files.adapter(PAIR, adapter_type="ia3"), "of the kind ia3, not a LoRA"),
        (lora_files.adapter({}), "has no tensors"),
        (ADAPTER[:-64], "it is incomplete"),
        (b"text", "does not begin with the letters GGUF"),
    ],
    ids=["model", "architecture", "kind", "empty", "cut off", "text"],
)
async def test_what_is_no_adapter_of_the_model_is_refused(
    folder: Folder, data: bytes, why: str
) -> None:
    wrong = folder.write("wrong.gguf", data)
    begin = rf"^The model own:1 .* cannot be served: its adapter \S*wrong\.gguf: .*{why}"
    with pytest.raises(CliError, match=begin):
        folder.with_adapters(folder.lora(1, wrong))
    wrong.unlink()
    with pytest.raises(CliError, match="No such file"):
        folder.with_adapters(folder.lora(1, wrong))


@pytest.mark.parametrize("scale", ["nan", "inf", "1001.0"])
async def test_a_scale_that_is_none_is_refused(folder: Folder, scale: str) -> None:
    adapter = f'{{ path = "{folder.adapter}", scale = {scale} }}'
    with pytest.raises(CliError, match=r"the scale of the adapter .* must be from -1000 to 1000"):
        folder.with_adapters(adapter)


async def test_adapters_need_a_name_and_a_path_of_their_own(folder: Folder) -> None:
    (folder.models / "base.gguf").write_bytes(BASE)
    with pytest.raises(CliError, match="with adapters it is another model, so write an entry"):
        folder.catalog(f'[[model]]\nname = "base:latest"\nadapters = [{folder.lora()}]\n')
    both = folder.with_adapters(folder.lora())
    assert digest(both) != digest(both, "base:latest") == hashlib.sha256(BASE).hexdigest()


async def test_an_adapter_in_the_models_folder_is_no_model(folder: Folder) -> None:
    (folder.models / "lora.gguf").write_bytes(ADAPTER)
    catalog = folder.catalog("")
    assert catalog.not_served[folder.models / "lora.gguf"] == (
        "it holds no model but adapter (its general.type)"
    )


async def test_the_engine_is_told_of_adapters_and_memory_counts_them(folder: Folder) -> None:
    model = folder.with_adapters(folder.lora(0.5)).find("own:1")
    load = load_of(model, EngineConfig(), Sizes(512, 512, 4))
    assert load.adapters == [Adapter(str(folder.adapter), 0.5)]
    sizes, cpu = Sizes(512, 512, 4), Division()
    taken, less = (needs(each).memory(sizes, cpu)[CPU] for each in (model, model.base))
    assert taken - less == len(ADAPTER)


async def test_doctor_names_an_adapter_that_was_changed(folder: Folder) -> None:
    folder.with_adapters(folder.lora(0.5))
    config = configs.load(folder.home / "box.toml", environ={})
    checks = [check for check in doctor.files(config, folder.home) if "own:1" in check.found]
    found = digest(folder.with_adapters(folder.lora(0.5)))
    assert [check.state for check in checks] == ["ok"]
    assert f"in 2 files, sha256 {found[:16]}" in checks[0].found
    folder.adapter.unlink()


async def test_a_peer_cannot_copy_a_model_with_adapters(folder: Folder, tmp_path: Path) -> None:
    catalog = folder.with_adapters(folder.lora())

    async def shared(_peer: str) -> Catalog:
        return catalog

    world = CopyNetwork(tmp_path / "network")
    giver = await world.giver(None)
    giver.sharing = FileServer(shared, giver.digests)
    try:
        for wanted in ("", digest(catalog)):
            answer = await asked(world, Find("own:1", wanted))
            assert isinstance(answer, FileRefused)
            assert answer.message.startswith("own:1 is a model with adapters, which cannot")
    finally:
        await world.end()


DRAFTED = '[[model]]\nname = "large:1"\npath = "{path}"\ndraft = "{draft}"\n'


def drafted(folder: Folder, draft: str, more: str = "") -> Catalog:
    large = folder.write("large.gguf", valid(u32("llama.block_count", 4), data=8192))
    (folder.models / "small:1.gguf").write_bytes(BASE)
    return folder.catalog(more + DRAFTED.format(path=large, draft=draft))


async def test_a_draft_model_is_another_model_of_the_box(folder: Folder) -> None:
    for name, more in (("small:1", ""), ("tiny", '[aliases]\ntiny = "small:1"\n')):
        model = drafted(folder, name, more).find("large:1")
        small = folder.models / "small:1.gguf"
        assert model.draft is not None and model.draft.id == "small:1"
        load = load_of(model, EngineConfig(), Sizes(512, 512, 4))
        assert load.draft == DraftFiles(str(small), 0, [], "small:1", [])
    with pytest.raises(CliError, match=r"^The draft model of large:1: .*'smal:1'.*small:1"):
        drafted(folder, "smal:1")


async def test_a_draft_model_changes_no_digest(folder: Folder) -> None:
    assert digest(drafted(folder, "small:1"), "large:1") == digest(drafted(folder, ""), "large:1")


async def test_a_model_goes_on_without_its_draft_model_if_that_has_gone(folder: Folder) -> None:
    """From the models folder, while the box runs."""
    before = drafted(folder, "small:1")
    (folder.models / "small:1.gguf").unlink()
    config = configs.load(folder.home / "box.toml", environ={})
    models = {"large:1": before.find("large:1")}
    after = catalog_loader.load(config, folder.home, configured=models)
    assert after.find("large:1").draft is None


async def test_memory_counts_a_draft_model_where_it_is(folder: Folder) -> None:
    model = drafted(folder, "small:1").find("large:1")
    sizes = Sizes(512, 512, 4)
    taken, less = (needs(each).memory(sizes, Division()) for each in (model, alone(model)))
    assert taken[CPU] >= less[CPU] + 4096
    for division in (Division((("CUDA0", 5),)), Division((("CUDA0", 3), ("CUDA1", 2)))):
        taken, less = (needs(each).memory(sizes, division) for each in (model, alone(model)))
        assert all(taken[device] >= less[device] for device in less) and CPU in taken
        assert taken["CUDA0"] > less["CUDA0"]


def alone(model: Model) -> Model:
    return replace(model, draft=None)


def needs(model: Model) -> ModelNeeds:
    config = EngineConfig()
    return ModelNeeds(model, load_of(model, config, rules_of(model, config).sizes))
