"""What a model costs: its own price, one that follows from its active parameters, or all's."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box import amount
from pinaivu_box.amount import MAX_AMOUNT, Prices, per_parameters
from pinaivu_box.config import Config, ModelConfig, PricingConfig
from pinaivu_box.models import catalog_loader
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.gguf import Header
from pinaivu_box.models.prices import prices_of
from pinaivu_box.policy import Policy, free_of_charge
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.offers import Offers
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.upstream.upstreams import Upstreams
from pinaivu_box.upstream_config import UpstreamConfig
from tests.support.gguf_files import aligned, header, tensor, u32, word
from tests.support.process_box import MODEL, StartBox

EXPERTS = (u32("llama.expert_count", 8), u32("llama.expert_used_count", 2))


def write(path: Path, *keys: bytes, **tensors: int) -> None:
    """A model whose tensors have so many parameters (a byte each)."""
    entries, at = [], 0
    for name, size in tensors.items():
        entries.append(tensor(name.replace("__", "."), size, at))
        at += size
    keys = (word("general.architecture", "llama"), *keys)
    path.write_bytes(aligned(header(keys, entries)) + bytes(at))


def served(folder: Path, *models: ModelConfig) -> dict[str, Model]:
    config = Config(models_dir=str(folder), model=list(models))
    return {model.id: model for model in catalog_loader.load(config, folder).models}


def test_of_experts_a_token_pays_for_those_that_it_uses(tmp_path: Path) -> None:
    dense = {"blk__0__attn_q__weight": 640, "blk__0__ffn_up_shexp__weight": 64}
    experts = {"blk__0__ffn_up_exps__weight": 3200, "blk__0__ffn_down_exps__weight": 3200}
    write(tmp_path / "moe.gguf", *EXPERTS, **dense, **experts)
    write(tmp_path / "dense.gguf", **dense)
    models = served(tmp_path)
    moe = models["moe:latest"].header
    assert (moe.parameters, moe.active_parameters) == (7104, 704 + 6400 * 2 // 8)
    assert models["dense:latest"].header.active_parameters == 704


def test_of_a_split_model_all_parts_count(tmp_path: Path) -> None:
    for number in (1, 2):
        split = (
            u32("split.count", 2), u32("split.no", number - 1), u32("split.tensors.count", 2)
        )  # fmt: skip
        keys = (*EXPERTS, *split) if number == 1 else split
        weights = {f"blk__{number}__ffn_up_exps__weight": 6400}
        write(tmp_path / f"moe-0000{number}-of-00002.gguf", *keys, **weights)
    found = served(tmp_path)["moe:latest"].header
    assert (found.parameters, found.active_parameters) == (12800, 3200)


@pytest.mark.parametrize(("used", "experts"), [(0, 8), (9, 8), (2, 0), (8, 8)])
def test_numbers_of_experts_that_say_nothing_make_nothing_cheaper(used: int, experts: int) -> None:
    odd = Header(parameters=100, expert_parameters=80, experts=experts, experts_used=used)
    assert odd.active_parameters == 100


def test_the_nearest_price_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", some=1000)
    pricing = PricingConfig(
        per_1k_tokens="9", per_billion="1000000", models={"a:latest": "3", "b:latest": "4"}
    )
    a = served(tmp_path)["a:latest"]
    assert prices_of(a, pricing) == Prices("3", "3")
    own = served(tmp_path, ModelConfig(name="a:latest", price=Prices("1", "2")))["a:latest"]
    assert prices_of(own, pricing) == Prices("1", "2")
    without = PricingConfig(per_1k_tokens="9", per_billion="1000000")
    assert prices_of(a, without) == Prices("1", "1")  # 1000 parameters of 10^9
    assert prices_of(a, PricingConfig(per_1k_tokens="9")) == Prices("9", "9")
    unknown = Model("fake:1", Path("fake:0"))  # no file says how many parameters it has
    assert prices_of(unknown, without) == Prices("9", "9")


def test_prompt_cached_and_completion_tokens_have_prices_by_parameters_too() -> None:
    each = Prices("0.001", "0.004", "0.0005")
    assert per_parameters(each, 3_000_000_000) == Prices("0.003", "0.012", "0.0015")
    assert per_parameters("0.001", 135_000_000) == Prices("0.000135", "0.000135")


@given(
    st.decimals(0, MAX_AMOUNT, places=6), st.integers(1, 2**62), st.integers(1, 2**62)
)  # fmt: skip
def test_whatever_the_size_a_price_is_one_and_more_parameters_cost_no_less(
    price: Decimal, one: int, other: int
) -> None:
    small, large = (
        per_parameters(str(price), number).completion for number in sorted((one, other))
    )
    assert 0 <= amount.per_token(small) <= amount.per_token(large)
    exact = price * min(one, other) / 10**9
    assert abs(Decimal(small) - min(exact, Decimal(MAX_AMOUNT))) <= Decimal("0.000001")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _nothing(_: Any) -> str:
    return "ab" * 32


@pytest.mark.anyio
async def test_peers_are_offered_the_price_that_follows_from_parameters(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", some=2000)
    config = Config(models_dir=str(tmp_path), pricing=PricingConfig(per_billion="500000"))
    settings = LiveSettings(
        BoxSettings(config, catalog_loader.load(config, tmp_path).matching(["a:*"]))
    )
    placement: Any = SimpleNamespace(replicas=lambda _: [], places=lambda _: 64, engines=[])
    upstreams = Upstreams(settings, "node_1")
    offers = Offers(settings, LoadTracker(placement), _nothing, lambda: False, upstreams)
    learnt = asyncio.Event()
    learning = asyncio.create_task(offers.keep_learning(learnt.set))
    await asyncio.wait_for(learnt.wait(), 60)
    learning.cancel()
    (offer,) = offers.describe().models
    assert offer.prices == ("1", "1", "1")


@pytest.mark.parametrize(
    ("free", "policy", "config"),
    [
        (True, Policy(), Config()),
        (False, Policy(), Config(pricing=PricingConfig(per_billion="1"))),
        (True, Policy(prices={"*": "0"}), Config(pricing=PricingConfig(per_billion="1"))),
        (False, Policy(prices={"a*": "0"}), Config(pricing=PricingConfig(per_billion="1"))),
        (False, Policy(), Config(model=[ModelConfig(name="a:1", price="1")])),
        (False, Policy(models=("a:1",)), Config(model=[ModelConfig(name="a:1", price="1")])),
        (True, Policy(models=("b:1",)), Config(model=[ModelConfig(name="a:1", price="1")])),
        (True, Policy(prices={"a:*": "0"}), Config(model=[ModelConfig(name="a:1", price="1")])),
        (False, Policy(), Config(upstream=[UpstreamConfig(name="u", url="", price="1")])),
        (
            True,
            Policy(models=("b",)),
            Config(upstream=[UpstreamConfig(name="u", url="", prices={"a": "1"})]),
        ),
    ],
)
def test_a_budget_has_an_effect_if_any_model_of_the_key_has_a_price(
    free: bool, policy: Policy, config: Config
) -> None:
    assert free_of_charge(policy, config) is free


def test_a_receipt_shows_the_price_that_follows_from_parameters(module_box: StartBox) -> None:
    box = module_box(config='[pricing]\nper_billion = "1"\n')
    done = box.chat(max_tokens=1).json()
    document = box.http("GET", f"/v1/receipts/{done['request_id']}").json()
    receipt = json.loads(document["signed_receipt"])
    price = Decimal(receipt["price"]["completion"])
    assert Decimal("0.13") < price < Decimal("0.14"), MODEL  # it has 135 million parameters
    assert Decimal(receipt["payment_amount"]) == price * done["usage"]["total_tokens"] / 1000
