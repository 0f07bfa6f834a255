"""The prediction of memory, compared with what llama.cpp says and takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pinaivu_box import engine_query
from pinaivu_box.engine.messages import CPU, LoadModel, Probe, Probed
from pinaivu_box.engine_query import QueryFailed
from pinaivu_box.models import bundled, fit, gguf
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.layer_caches import LayerCache, layer_caches
from pinaivu_box.models.probe import Prober
from tests.support import gguf_files
from tests.support.bare_engine import engine
from tests.support.model_shapes import SHAPES

pytestmark = pytest.mark.anyio

MIB = 2**20


def load_of(path: Path, **settings: Any) -> LoadModel:
    return replace(LoadModel(str(path), 0, 2048, 4096, 4, 512, 1), **settings)


@pytest.fixture(scope="module")
def smollm() -> Path:
    where = bundled.find()
    assert where is not None and where.offset == 0
    return where.path


@pytest.mark.parametrize("kv_type", ["f16", "q4_0"])
async def test_an_engine_takes_what_was_predicted(smollm: Path, kv_type: str) -> None:
    """Each part within 5 %, and the process as a whole not more than that."""
    load = load_of(smollm, kv_type=kv_type)
    predicted = fit.spread(fit.need(gguf.read_header(smollm), load))
    async with engine(load) as process:
        (taken,) = process.ready.memory
        resident = process.memory
    assert predicted.host.memory.weights == pytest.approx(taken.weights, rel=0.05)
    assert predicted.host.memory.cache == pytest.approx(taken.cache, rel=0.05)
    assert predicted.host.memory.compute == pytest.approx(taken.compute, rel=0.05)
    assert predicted.host.total == pytest.approx(taken.total, rel=0.05)
    assert resident <= predicted.host_total * 1.05


@pytest.mark.parametrize("name", ["llama-70b", "gemma3-4b"])
async def test_shapes_of_any_size_are_predicted_as_llama_cpp_reckons(
    name: str, tmp_path: Path
) -> None:
    """It reads the header and allocates nothing; tests/bench/fit_shapes compares more of them."""
    path = SHAPES[name].write(tmp_path)
    load = load_of(path, context=8192, kv_tokens=16_384, max_sequences=16)
    header = gguf.read_header(path)
    probed = await engine_query.ask(Probe(load), Probed, 300)
    predicted, exact = fit.need(header, load), fit.need(header, load, probed)
    tied = header.embedding_bytes if header.tied_output else 0
    weights = sum(predicted.weights) + predicted.input + predicted.output - tied
    assert weights == probed.weights
    assert sum(predicted.cache) == probed.cache
    assert predicted.on_cpu == pytest.approx(exact.on_cpu, rel=0.01)


async def test_a_model_that_llama_cpp_does_not_read_is_refused_with_its_reason(
    tmp_path: Path,
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(gguf_files.valid())
    with pytest.raises(engine_query.QueryFailed, match=r"cannot load odd\.gguf: "):
        await engine_query.ask(Probe(load_of(path)), Probed, 300)


# -- dividing ----------------------------------------------------------------------------------


def test_layers_are_divided_as_llama_cpp_does() -> None:
    """Figures that llama.cpp has logged."""
    assert fit.divided(31, [1024, 512]) == [21, 10]
    assert fit.divided(31, [1, 3]) == [8, 23]
    assert fit.divided(31, [10, 21]) == [10, 21]
    assert fit.divided(33, [1, 1, 1]) == [11, 11, 11]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8).filter(any))
def test_counts_as_proportions_give_these_counts(counts: list[int]) -> None:
    """So that a plan in layers is what llama.cpp does."""
    assert fit.divided(sum(counts), [float(count) for count in counts]) == counts


SIZES = st.integers(0, 2**40)


@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=20),
    st.booleans(),
    st.lists(st.integers(0, 20), max_size=4),
)
def test_nothing_is_lost_or_counted_twice(
    layers: list[tuple[int, int]], tied: bool, counts: list[int]
) -> None:
    need = fit.Need(
        weights=tuple(weights for weights, _ in layers),
        cache=tuple(cache for _, cache in layers),
        input=1000,
        output=1010 if tied else 500,
        tied=tied,
        compute=fit.Compute(0, 0, 0, 0),
    )
    left = need.layers
    gpus = []
    for number, count in enumerate(counts):
        gpus.append((f"CUDA{number}", min(count, left)))
        left -= gpus[-1][1]
    spread = fit.spread(need, gpus)
    shares = [*spread.gpus, spread.host]
    assert sum(share.layers for share in shares) == need.layers
    assert sum(share.memory.cache for share in shares) == sum(need.cache)
    output_on_gpu = sum(count for _, count in gpus) > 0
    expected = sum(need.weights) + 1000 + need.output
    if tied and not output_on_gpu:
        expected -= 1000  # the same tensor
    assert sum(share.memory.weights for share in shares) == expected


def test_what_llama_cpp_has_said_counts_for_the_devices_it_was_asked_for(tmp_path: Path) -> None:
    path = SHAPES["tiny"].write(tmp_path)
    probed = Probed(weights=0, cache=0, compute={"CUDA0": 7 * MIB, CPU: 3 * MIB})
    need = fit.need(gguf.read_header(path), load_of(path), probed)
    spread = fit.spread(need, [("CUDA0", need.layers)])
    assert spread.gpus[0].memory.compute == 7 * MIB
    assert spread.host.memory.compute == 3 * MIB
    assert fit.spread(need).host.memory.compute != 3 * MIB


# -- what layers remember ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("llama", {"attention.head_count_kv": (2, 0, 4)},
         [LayerCache(32, 32), LayerCache(), LayerCache(64, 64)]),
        ("gemma4", {"attention.head_count_kv": 2, "attention.shared_kv_layers": 1,
                    "attention.sliding_window_pattern": (1, 0, 0),
                    "attention.key_length_swa": 8, "attention.value_length_swa": 8},
         [LayerCache(16, 16), LayerCache(32, 32), LayerCache()]),
        ("deepseek2", {"attention.head_count_kv": 1, "attention.key_length_mla": 24},
         [LayerCache(16, 0)] * 3),
        ("glm4moe", {"attention.head_count_kv": 2, "nextn_predict_layers": 1},
         [LayerCache(32, 32)] * 2 + [LayerCache()]),
        ("mamba", {"ssm.inner_size": 128, "ssm.state_size": 4, "ssm.conv_kernel": 4},
         [LayerCache(state=3 * 128 + 4 * 128)] * 3),
        ("rwkv7", {"wkv.head_size": 16}, [LayerCache(state=64 * (2 + 16))] * 3),
        ("falcon-h1", {"attention.head_count_kv": 2, "ssm.inner_size": 8, "ssm.state_size": 2},
         [LayerCache(32, 32, 16)] * 3),
        ("qwen3next", {"full_attention_interval": 3, "attention.head_count_kv": 2,
                       "ssm.inner_size": 8, "ssm.state_size": 2},
         [LayerCache(state=16), LayerCache(state=16), LayerCache(32, 32)]),
        ("bert", {}, [LayerCache()] * 3),
    ],
)  # fmt: skip
def test_what_each_layer_remembers_follows_from_the_metadata(
    architecture: str, keys: dict[str, int | tuple[int, ...]], expected: list[LayerCache]
) -> None:
    common: dict[str, int | tuple[int, ...]] = {
        "block_count": 3,
        "embedding_length": 64,
        "attention.head_count": 4,
    }
    metadata = {f"{architecture}.{name}": value for name, value in (common | keys).items()}
    assert list(layer_caches(architecture, metadata)) == expected


@given(
    st.sampled_from(["llama", "mamba", "gemma4", "nemotron_h", "qwen35", ""]),
    st.dictionaries(
        st.sampled_from(["block_count", "attention.head_count", "attention.head_count_kv",
                         "embedding_length", "ssm.conv_kernel", "full_attention_interval",
                         "attention.recurrent_layers", "nextn_predict_layers"]),
        st.integers(-(2**63), 2**64) | st.lists(st.integers(0, 2**32), max_size=4).map(tuple)
        | st.text(max_size=3) | st.floats(),
    ),
)  # fmt: skip
def test_metadata_that_no_model_has_does_no_harm(architecture: str, keys: dict[str, Any]) -> None:
    metadata = {f"{architecture}.{name}": value for name, value in keys.items()}
    caches = layer_caches(architecture, metadata)
    assert len(caches) <= 512
    assert all(min(each.keys, each.values, each.state) >= 0 for each in caches)


def test_a_model_in_parts_takes_what_it_takes_in_one_file(tmp_path: Path) -> None:
    real = gguf_files.Real.read()
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(real.written(real.keys))
    parts = gguf_files.put_split(tmp_path, "model", real.split(3))
    joined = gguf.joined([gguf.read_header(part) for part in parts])
    one = gguf.read_header(whole)
    for name in ("layer_bytes", "input_bytes", "output_bytes", "caches", "vocabulary"):
        assert getattr(joined, name) == getattr(one, name), name
    assert joined.tied_output and one.tied_output
    assert fit.on_cpu(joined, 512) == fit.on_cpu(one, 512)


async def test_llama_cpp_is_asked_once_for_the_same_files_and_the_same_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = SHAPES["tiny"].write(tmp_path)
    model, load = Model("tiny:1", path, size=path.stat().st_size), load_of(path)
    prober = Prober()
    first = await prober.probe(model, load)
    assert first is not None and first.weights > 0
    asked = []

    async def ask(question: Probe, _answer: object, _seconds: float) -> Probed:
        asked.append(question)
        raise QueryFailed("it is busy")

    monkeypatch.setattr(engine_query, "ask", ask)
    assert await prober.probe(model, replace(load, template="{{ messages }}")) == first
    assert await prober.probe(model, replace(load, kv_type="q8_0")) is None
    assert await prober.probe(dataclasses.replace(model, created=1), load) is None
    assert len(asked) == 2
