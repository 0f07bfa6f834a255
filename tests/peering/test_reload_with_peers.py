"""A reload of a box with peers: what it may spend, what peers may use, and what they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from pinaivu_box import logs
from pinaivu_box.config import Config, PricingConfig, SharedPrefix
from tests.support.fake_model import DEAR, FAKE
from tests.support.in_process_box import InProcessBox, count_offers, in_process_box
from tests.support.memory_transport import MemoryNetwork
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
ADDRESS = "box.example:4002"


def changed(config: Config) -> Config:
    """With other settings of all that peers are about."""
    serve = replace(
        config.peering.serve, max_parallel=3, tokens_per_minute=777, credit_limit="5", hours=""
    )
    peering = replace(
        config.peering, max_price="0.5", max_debt="7", advertise=(ADDRESS,), serve=serve
    )
    return replace(config, peering=peering, pricing=PricingConfig("shells", "3"))


async def shown(box: InProcessBox) -> dict[str, Any]:
    """What the box says of itself and of its only peer."""
    answer = (await box.http("GET", "/v1/admin/peers")).json()
    (peer,) = answer["data"]
    facts = box.box.offers.describe()
    return {
        "advertised": ADDRESS in answer["own"]["addresses"],
        "limits": [peer["use"][name] for name in ("max_parallel", "tokens_per_minute",
                                                  "credit_limit")],
        "spending": [peer["cost"]["max_debt"], FAKE in peer["cost"]["too_dear"]],
        "currency": facts.currency,
        "prices": [offer.prices[0] for offer in facts.models if offer.id == FAKE],
    }  # fmt: skip


async def reload(box: InProcessBox, config: Config) -> httpx.Response:
    box.box.read_config = lambda: config
    return await box.http("POST", "/v1/admin/reload")


async def test_a_reload_replaces_every_setting_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "configure", lambda _: None)  # the log is that of all tests
    net = MemoryNetwork()
    async with (
        in_process_box(net, tmp_path / "anna") as anna,
        in_process_box(net, tmp_path / "ben", (FAKE,), pricing__per_1k_tokens=DEAR) as ben,
    ):
        await soon(ben.network.join(await anna.network.invite()))
        await wait_until(lambda: count_offers(anna) == 1)
        before = [await shown(box) for box in (anna, ben)]
        assert before[0]["spending"] == [None, False] and before[1]["prices"] == [DEAR]
        assert (await anna.chat()).status_code == 200
        for box in (anna, ben):
            config = changed(box.box.config)
            # All of it is valid but the file that is read last.
            missing = (SharedPrefix(file=str(tmp_path / "none")),)
            engine = replace(config.engine, shared_prefixes=missing)
            refused = await reload(box, replace(config, engine=engine))
            assert refused.status_code == 422 and "none cannot be read" in refused.text
        assert [await shown(box) for box in (anna, ben)] == before
        assert (await anna.chat()).status_code == 200
        for box in (anna, ben):
            assert (await reload(box, changed(box.box.config))).status_code == 200
        after = [await shown(box) for box in (anna, ben)]
        assert all(one["advertised"] and one["limits"] == [3, 777, "5"] for one in after)
        assert all(one["currency"] == "shells" for one in after)
        assert after[0]["spending"] == ["7", True] and after[1]["prices"] == ["3"]
        refused = await anna.chat()  # ben is over anna's highest price now
        assert refused.status_code == 503 and "at most 0.5 (max_price)" in refused.text
