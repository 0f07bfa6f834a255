"""Frames between the box and its engine."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_box.engine import messages
from pinaivu_box.engine.messages import Add, Cancel, LoadModel, Sampling, StepFrame

TEXT = st.text(max_size=20)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
IDS_AS_TEXT = st.integers(0, 10**9 - 1).map(str)
TRUNCATION = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 2**31 - 1),
    "min_p": st.floats(0, 1, exclude_max=True),
}
SAMPLINGS = st.builds(
    Sampling,
    **TRUNCATION,
    seed=st.integers(-(2**63), 2**63 - 1),
    ignore_eos=st.booleans(),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(IDS_AS_TEXT, st.floats(-100, 100), max_size=3),
)
DEFAULTS = st.builds(
    messages.SamplingDefaults,
    **{name: st.none() | values for name, values in TRUNCATION.items()},
)
CHATS = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)
SIZES = st.integers(0, 2**63)
SWITCHES = dict.fromkeys(("drafting", "context_shift", "parse_special"), st.booleans())
NAMES = ("model", "template", "projector", "projector_digest")
PARTS = {"parts": st.lists(TEXT, max_size=3), **dict.fromkeys(NAMES, TEXT)}
DEVICES = {
    "devices": st.lists(TEXT, max_size=3),
    "gpu_layers": st.integers(-1, 500),
    "split": st.sampled_from(["layer", "tensor", "none"]),
    "tensor_split": st.lists(FLOATS, max_size=3),
    "main_device": TEXT,
    "kv_type": st.sampled_from(["f16", "q8_0"]),
}
SAVED = st.builds(messages.SavedPrefixes, folder=TEXT, key=st.binary(max_size=32), max_bytes=SIZES)
ADAPTERS = st.lists(st.builds(messages.Adapter, TEXT, FLOATS), max_size=2)
DRAFT = st.builds(
    messages.DraftFiles, TEXT, SIZES, st.lists(TEXT, max_size=2), model=TEXT, adapters=ADAPTERS
)
LOADS: dict[str, st.SearchStrategy[Any]] = {
    name: SIZES for name in LoadModel.__struct_fields__ if name != "path"
}
LOADS |= {**SWITCHES, **PARTS, **DEVICES, "saved": st.none() | SAVED}
LOADS |= {"exact": st.sampled_from([True, False, "auto"]), "cpu_variant": TEXT}
LOADS |= {"adapters": ADAPTERS, "draft": st.none() | DRAFT}
READY = dict.fromkeys(("context", "kv_tokens", "max_sequences"), SIZES)
MEMORY = st.lists(
    st.builds(messages.DeviceMemory, TEXT, weights=SIZES, cache=SIZES, compute=SIZES), max_size=3
)
SHORTAGE = st.builds(
    messages.OutOfMemory, TEXT, SIZES, st.sampled_from(["weights", "cache", "compute", ""])
)
DEVICE = st.builds(
    messages.ListedDevice,
    name=TEXT,
    description=TEXT,
    kind=st.sampled_from(["cpu", "gpu", "igpu", "accel"]),
    pci_id=TEXT,
    total=SIZES,
    free=SIZES,
)
TO_ENGINE = st.one_of(
    st.builds(LoadModel, path=TEXT, **LOADS),
    st.builds(
        Add,
        id=TEXT,
        messages=CHATS,
        sampling=SAMPLINGS,
        max_tokens=st.none() | st.integers(1, 2**31),
        stop=st.lists(TEXT, max_size=3),
        tenant=TEXT,
        output=IDS,
        weight=FLOATS,
        priority=st.integers(-(2**31), 2**31),
        scope=TEXT,
        named=st.booleans(),
    ),
    st.builds(messages.Named, texts=st.lists(TEXT, max_size=3)),
    st.builds(Cancel, id=TEXT),
    st.builds(messages.SavePrefixes),
    st.builds(messages.ListDevices),
    st.builds(messages.Probe, load=st.builds(LoadModel, path=TEXT, **LOADS)),
)
FROM_ENGINE = st.one_of(
    st.builds(messages.Ready, build=TEXT, device=TEXT, defaults=DEFAULTS, memory=MEMORY, **READY),
    st.builds(messages.LoadFailed, message=TEXT, memory=st.none() | SHORTAGE),
    st.builds(
        messages.Devices,
        devices=st.lists(DEVICE, max_size=3),
        backends=st.lists(st.builds(messages.GgmlBackend, TEXT, SIZES, TEXT, TEXT), max_size=2),
    ),
    st.builds(messages.PrefixesSaved, SIZES, SIZES, SIZES),
    st.builds(
        messages.Probed,
        weights=SIZES,
        cache=SIZES,
        compute=st.dictionaries(TEXT, SIZES, max_size=3),
    ),
    st.builds(
        StepFrame,
        prompts=st.dictionaries(TEXT, st.builds(messages.Prompt, tokens=IDS), max_size=2),
        refused=st.lists(st.builds(messages.Refused, id=TEXT, code=TEXT, message=TEXT), max_size=2),
        outputs=st.dictionaries(
            TEXT,
            st.builds(
                messages.Output,
                text=TEXT,
                tokens=IDS,
                finish_reason=st.sampled_from([None, "stop", "length", "cancelled"]),
                queue_ms=st.none() | FLOATS,
                cached_tokens=st.none() | SIZES,
                shifted_tokens=SIZES,
            ),
            max_size=3,
        ),
        load=st.builds(
            messages.EngineLoad, **dict.fromkeys(messages.EngineLoad.__struct_fields__, SIZES)
        ),
    ),
)


@settings(max_examples=150)
@given(st.lists(TO_ENGINE, max_size=4), st.lists(FROM_ENGINE, max_size=4))
def test_frames_come_out_as_they_went_in(down: list[Any], up: list[Any]) -> None:
    """Both directions, several frames in one stream, then its end."""
    for sent, decode in ((down, messages.decode_to_engine), (up, messages.decode_from_engine)):
        stream = io.BytesIO(b"".join(messages.encode(message) for message in sent))
        for message in sent:
            body = messages.read_body(stream)
            assert body is not None and decode(body) == message
        assert messages.read_body(stream) is None


@given(TO_ENGINE, st.data())
def test_a_frame_that_is_cut_off_is_the_end(message: Any, data: st.DataObject) -> None:
    whole = messages.encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert messages.read_body(io.BytesIO(whole[:cut])) is None


def test_a_frame_that_no_honest_side_sends_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="larger"):
        messages.body_length(b"\xff\xff\xff\xff")
