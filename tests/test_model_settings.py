"""Settings of models that an operator sets while the box runs: they count before the configuration,
until they are reset."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.config import ModelConfig, SamplingConfig
from pinaivu_box.errors import CliError
from pinaivu_box.models import overrides
from pinaivu_box.models.overrides import ModelOverrides
from pinaivu_box.store import audit
from tests.support.fake_model import FAKE
from tests.support.in_process_box import InProcessBox, in_process_box
from tests.support.in_process_command import run_command, run_command_json
from tests.support.memory_transport import MemoryNetwork
from tests.support.operated_models import done, post, put_model, refusal

pytestmark = pytest.mark.anyio
CONFIGURED = ModelConfig(
    name="tiny:1b", context=512, keep_alive="9m", sampling=SamplingConfig(top_p=0.8)
)


@pytest.fixture
async def anna(tmp_path: Path) -> AsyncIterator[InProcessBox]:
    put_model(tmp_path / "anna")
    async with box_at(tmp_path) as box:
        yield box


def box_at(folder: Path) -> Any:
    """A box with a fake model, and a file whose settings are configured."""
    return in_process_box(
        MemoryNetwork(), folder / "anna", (FAKE,), model=[CONFIGURED], sampling__temperature=0.5
    )


async def drawn_with(box: InProcessBox, **fields: Any) -> dict[str, Any]:
    """The sampling that the proof of an answer names."""
    answer = await box.chat(max_tokens=1, **fields)
    assert answer.status_code == 200, answer.text
    receipt = await box.http("GET", f"/v1/receipts/{answer.json()['request_id']}")
    signed = json.loads(receipt.json()["signed_receipt"])
    sampling: dict[str, Any] = json.loads(signed["proofs"][0]["signed"])["sampling"]
    return sampling


async def shown(box: InProcessBox, model: str = "tiny:1b") -> dict[str, Any]:
    return await done(box, "show", model=model)


async def test_defaults_that_are_set_count_for_the_next_request(anna: InProcessBox) -> None:
    assert (await drawn_with(anna))["temperature"] == 0.5
    set_ = await done(anna, "set", model=FAKE, settings={"sampling": {"temperature": 0.25}})
    assert set_["overrides"] == {"sampling": {"temperature": 0.25}} and set_["reload"] == []
    assert (await drawn_with(anna))["temperature"] == 0.25
    assert (await drawn_with(anna, temperature=1.5))["temperature"] == 1.5  # the request's word
    await done(anna, "set", model=FAKE, settings={"sampling": {"temperature": None}})
    assert (await drawn_with(anna))["temperature"] == 0.5


async def test_a_setting_counts_before_the_configuration_until_it_is_reset(
    anna: InProcessBox,
) -> None:
    before = await shown(anna)
    assert before["overrides"] == {} and before["settings"]["context"] == 512
    settings = {"context": 1024, "keep_alive": "2h", "sampling": {"top_p": 0.5, "top_k": 7}}
    await done(anna, "set", model="tiny:1b", settings=settings)
    after = await shown(anna)
    assert after["overrides"] == settings
    assert after["context"] == 1024 and after["settings"]["keep_alive"] == "2h"
    assert after["settings"]["sampling"] == {"temperature": 0.5, "top_p": 0.5, "top_k": 7}
    assert (after["configured"]["context"], after["configured"]["keep_alive"]) == (512, "9m")
    assert after["configured"]["sampling"] == {"temperature": 0.5, "top_p": 0.8}
    one = await done(anna, "set", model="tiny:1b", settings={"context": None})
    assert one["overrides"] == {k: v for k, v in settings.items() if k != "context"}
    assert one["settings"]["context"] == 512
    all_but_one = await done(anna, "set", model="tiny:1b", settings={"pin": True}, reset=True)
    assert all_but_one["overrides"] == {"pin": True}
    await done(anna, "set", model="tiny:1b", reset=True)
    # The file's digest is computed in the background meanwhile.
    assert {**await shown(anna), "digest": before["digest"]} == before


async def test_settings_outlive_the_box_and_a_reload_and_go_with_the_model(tmp_path: Path) -> None:
    put_model(tmp_path / "anna")
    async with box_at(tmp_path) as box:
        await done(box, "set", model="tiny:1b", settings={"context": 256})
        assert (await box.http("POST", "/v1/admin/reload")).status_code == 200
        assert (await shown(box))["context"] == 256
    async with box_at(tmp_path) as box:
        assert (await shown(box))["context"] == 256
        await done(box, "delete", model="tiny:1b")
        put_model(tmp_path / "anna")
        await box.box.look_for_models()
        assert (await shown(box))["context"] == 512


async def test_what_an_engine_was_started_with_counts_until_it_is_loaded_again(
    anna: InProcessBox,
) -> None:
    await done(anna, "load", model=FAKE)
    set_ = await done(anna, "set", model=FAKE, settings={"context": 300, "parallel": 3})
    assert set_["reload"] == ["context", "parallel"]
    (engine,) = anna.box.placement.engines
    assert engine.ready.context != 300
    await done(anna, "unload", model=FAKE)
    assert (await done(anna, "load", model=FAKE))["context"] == 300
    assert anna.box.placement.places(FAKE) == 3
    again = await done(anna, "set", model=FAKE, settings={"context": 300})
    assert again["reload"] == []  # nothing is new


async def test_a_pin_for_good_replaces_the_one_until_the_box_stops(anna: InProcessBox) -> None:
    await done(anna, "pin", model=FAKE, pinned=False)
    await done(anna, "set", model=FAKE, settings={"pin": True})
    answer = await done(anna, "pin", model=FAKE, pinned=True)
    assert answer == {"model": FAKE, "pinned": True, "configured": True}
    await done(anna, "set", model=FAKE, reset=True)
    models = (await anna.http("GET", "/v1/admin/models")).json()["data"]
    assert [model["pinned"] for model in models if model["id"] == FAKE] == [False]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"context": 0}, "context"),
        ({"parallel": 1000}, "parallel"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"kv_type": "f64"}, "kv_type"),
        ({"gpu_layers": "all"}, "gpu_layers"),
        ({"sampling": {"temperature": 3}}, "temperature"),
        ({"sampling": {"heat": 1}}, "sampling"),
        ({"template": "/etc/passwd"}, "template"),  # no file is named over HTTP
    ],
)
async def test_what_is_not_valid_is_refused_and_changes_nothing(
    anna: InProcessBox, settings: dict[str, Any], field: str
) -> None:
    answer = await post(anna, "set", model=FAKE, settings=settings)
    assert answer.status_code == 422 and field in answer.text, answer.text
    assert not (anna.box.home / overrides.FILE_NAME).exists()


async def test_only_models_of_this_box_have_settings(anna: InProcessBox) -> None:
    status, message = await refusal(anna, "set", model="none:1", settings={"context": 5})
    assert status == 404 and "none:1" in message


async def test_the_audit_trail_has_what_was_set(anna: InProcessBox) -> None:
    await done(anna, "set", model=FAKE, settings={"context": 300})
    await done(anna, "set", model=FAKE, settings={"context": 400, "pin": True})
    entry = next(one for one in await audit.ls(anna.box.database) if one.action == "model.set")
    assert entry.target == FAKE
    assert entry.detail["before"] == {"context": 300}
    assert entry.detail["after"] == {"context": 400, "pin": True}
    assert "300 → 400" in await anna.page("/admin/audit?action=model.set")


async def test_the_page_of_a_model_says_what_is_set_and_what_would_count(
    anna: InProcessBox,
) -> None:
    text = await anna.page("/admin/models/show?model=tiny:1b")
    assert 'data-action="settings"' in text and ">set here<" not in text
    assert 'data-action="reset-settings"' not in text
    settings = {"context": 300, "sampling": {"top_p": 0.25}}
    await done(anna, "set", model="tiny:1b", settings=settings)
    text = await anna.page("/admin/models/show?model=tiny:1b")
    assert text.count(">set here<") == 2
    assert 'title="Without it: 512"' in text and 'title="Without it: 0.8"' in text
    assert 'data-action="reset-settings"' in text


def test_a_command_sets_and_resets_without_a_server(tmp_path: Path) -> None:
    put_model(tmp_path)
    done_ = run_command("set", "tiny:1b", "temperature=0.5", "context=256", "pin=no", home=tmp_path)
    assert done_.stdout == "tiny:1b: context 256, pin no, temperature 0.5\n"
    described = run_command_json("show", "tiny:1b", home=tmp_path)
    assert described["overrides"] == {
        "context": 256, "pin": False, "sampling": {"temperature": 0.5},
    }  # fmt: skip
    assert (
        "context 256, pin no, temperature 0.5"
        in run_command("show", "tiny:1b", home=tmp_path).stdout
    )
    run_command("set", "tiny:1b", "context=", home=tmp_path)
    assert run_command_json("show", "tiny:1b", home=tmp_path)["overrides"] == {
        "pin": False, "sampling": {"temperature": 0.5},
    }  # fmt: skip
    for wrong in (["heat=1"], ["context"], ["context=big"], ["pin=maybe"], []):
        refused = run_command("set", "tiny:1b", *wrong, home=tmp_path, check=False)
        assert refused.returncode == 2, wrong
    reset = run_command("set", "tiny:1b", "--reset", home=tmp_path)
    assert reset.stdout == "tiny:1b: all is as configured\n"


def test_a_damaged_file_is_named_and_not_passed_over(tmp_path: Path) -> None:
    for content in ("{", '{"a:1": {"context": 0}}', '{"a:1": {"keep_alive": "x"}}', '{" ": {}}'):
        (tmp_path / overrides.FILE_NAME).write_text(content)
        with pytest.raises(CliError, match=r"model_settings\.json cannot be read"):
            overrides.read(tmp_path)
    kept = {"a:1": ModelOverrides(gpu_layers="auto", preload=False)}
    overrides.write({**kept, "b:1": ModelOverrides()}, tmp_path)
    assert overrides.read(tmp_path) == kept
