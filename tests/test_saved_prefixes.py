"""Prefixes that are saved when a model is unloaded: from the placement to the files and back."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from pinaivu_box import identity as identities
from pinaivu_box.config import Config, EngineConfig, ModelConfig
from pinaivu_box.engine.messages import Output, Sampling, SamplingParams
from pinaivu_box.gateway.backend import Event, Job
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.saved_prefixes import FOLDER, SavedPrefixFolder
from pinaivu_box.models import bundled, catalog_loader
from pinaivu_box.models.catalog import Model
from pinaivu_box.settings import BoxSettings, LiveSettings

STORY = "Once upon a time there was a box that answered whoever asked it politely. " * 12


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def live(size: int = 1) -> LiveSettings:
    return LiveSettings(BoxSettings(Config(engine=EngineConfig(saved_prefixes_mb=size))))


class Unloaded:
    """A model that is unloaded after each answer."""

    def __init__(self, home: Path) -> None:
        location = bundled.find()
        assert location is not None
        entry = ModelConfig(name="m:1", path=str(location.path))
        engine = EngineConfig(context=1024, kv_tokens=2048, max_sequences=2, keep_alive="-1")
        config = Config(engine=engine, model=[entry])
        models = catalog_loader.load(config, Path("/nonexistent"))
        settings = LiveSettings(BoxSettings(config, models))
        self.model = models.find("m:1")
        self.placement = Placement(settings, self._digest)
        identity = identities.load_or_create(home / "identity")
        self.placement.saved_prefixes = SavedPrefixFolder(home, identity, settings).of
        self.backend = LocalBackend(self.placement, "", settings)

    async def _digest(self, _: Model) -> str:
        return "00" * 32

    async def answer(self, scope: str) -> tuple[list[int], int, int]:
        """Its tokens, how many of the prompt were cached, and how many restored."""
        job = Job(
            request_id="r",
            model=self.model,
            messages=[{"role": "user", "content": STORY}],
            sampling=SamplingParams(seed=3),
            max_tokens=8,
            stop=[],
            tenant=scope,
            scope=scope,
            drawn_with=Sampling(temperature=0),
        )
        tokens: list[int] = []
        cached = 0
        events: list[Event] = []
        await self.backend.start(job).run(events.append)
        for event in events:
            if isinstance(event, Output):
                tokens += event.tokens
                cached = event.cached_tokens or cached
        (engine,) = self.placement.engines
        restored = engine.load.tokens_restored
        assert await self.placement.unload("m:1") == 0
        return tokens, cached, restored


@pytest.mark.anyio
async def test_a_model_that_wakes_has_what_this_account_asked_before_and_no_other_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    box = Unloaded(tmp_path)
    try:
        first, cached, restored = await box.answer("acc_1")
        assert cached == restored == 0
        again, cached, restored = await box.answer("acc_1")
        assert again == first and restored >= cached > 150
        other, cached, restored = await box.answer("acc_2")
        assert other == first and cached == restored == 0
        folder = tmp_path / FOLDER
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = list(folder.iterdir())
        assert len(files) == 2
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert all(b"polite" not in path.read_bytes() for path in files)
    finally:
        await box.placement.close()


def test_the_folder_keeps_what_was_used_last_within_its_budget(tmp_path: Path) -> None:
    identity = identities.load_or_create(tmp_path / "identity")
    folder = tmp_path / FOLDER
    folder.mkdir()
    for number in range(4):
        path = folder / f"{number}.prefix"
        path.write_bytes(bytes(400_000))
        os.utime(path, (0, time.time() - 100 * number))
    os.utime(folder / "1.prefix", (0, time.time() - 8 * 86400))
    (folder / "x.1.new").write_bytes(b"half")
    os.utime(folder / "x.1.new", (0, time.time() - 3600))
    assert SavedPrefixFolder(tmp_path, identity, live()).of("d") is not None
    assert sorted(path.name for path in folder.iterdir()) == ["0.prefix", "2.prefix"]
    assert SavedPrefixFolder(tmp_path, identity, live(0)).of("d") is None
    assert list(folder.iterdir()) == []


def test_each_model_and_each_box_has_a_key_of_its_own(tmp_path: Path) -> None:
    keys = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        identity = identities.load_or_create(tmp_path / name / "identity")
        folder = SavedPrefixFolder(tmp_path / name, identity, live())
        for digest in ("00" * 32, "11" * 32):
            saved = folder.of(digest)
            assert saved is not None
            keys |= {saved.key}
            assert folder.of(digest) == saved
    assert len(keys) == 4
    assert identity.secret("a") != identity.secret("b")
