"""What operators do with models: describe, load, unload and delete them, and give them names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import pytest

from pinaivu_box import config
from pinaivu_box.models import aliases as alias_file
from pinaivu_box.models import bundled
from pinaivu_box.models.record import ModelParameters
from pinaivu_box.policy import Policy
from pinaivu_box.store import accounts, audit
from pinaivu_box.store.audit import Actor
from pinaivu_box.store.new_keys import Draft, create
from tests.support import gguf_files
from tests.support.fake_model import FAKE
from tests.support.in_process_box import InProcessBox, count_offers, in_process_box
from tests.support.in_process_command import run_command, run_command_json
from tests.support.memory_transport import MemoryNetwork
from tests.support.operated_models import FILE, done, post, put_model, refusal
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio

LICENSE = "Be Nice License\n\nBe nice to each other."


@pytest.fixture
async def anna(tmp_path: Path) -> AsyncIterator[InProcessBox]:
    """A box with a fake model and a file."""
    put_model(tmp_path / "anna")
    async with in_process_box(MemoryNetwork(), tmp_path / "anna", (FAKE,)) as box:
        yield box


async def key(box: InProcessBox, *models: str) -> str:
    draft = Draft("limited", accounts.OWNER, Policy(models=models))
    _, secret = await create(box.box.database, draft, Actor("test", "local"))
    return secret


async def names(box: InProcessBox, secret: str | None = None) -> list[str]:
    listed = await box.http("GET", "/v1/models", secret=secret or box.secret)
    return [model["id"] for model in listed.json()["data"]]


# -- aliases ---------------------------------------------------------------------------------------


async def test_an_alias_answers_on_every_api_as_the_model_that_runs(anna: InProcessBox) -> None:
    made = await done(anna, "copy", source=FAKE, destination="gpt-4o-mini")
    assert made == {"alias": "gpt-4o-mini", "model": FAKE}
    for name in ("gpt-4o-mini", "gpt-4o-mini:latest"):
        answer = (await anna.chat(model=name)).json()
        receipt = await anna.http("GET", f"/v1/receipts/{answer['request_id']}")
        signed = json.loads(receipt.json()["signed_receipt"])
        assert answer["model"] == signed["model"] == FAKE
    ollama = await anna.http(
        "POST",
        "/api/generate",
        json={"model": "gpt-4o-mini", "prompt": "hi", "stream": False, "raw": True},
    )
    assert ollama.json()["model"] == FAKE
    shown = await anna.http("POST", "/api/show", json={"model": "gpt-4o-mini"})
    assert shown.status_code == 200
    tags = (await anna.http("GET", "/api/tags")).json()["models"]
    assert {FAKE, "gpt-4o-mini"} <= {tag["name"] for tag in tags}
    listed = (await anna.http("GET", "/v1/models")).json()["data"]
    (alias,) = [model for model in listed if model["id"] == "gpt-4o-mini"]
    assert alias["alias_of"] == FAKE and alias["object"] == "model"
    one = (await anna.http("GET", "/v1/models/gpt-4o-mini")).json()
    assert {name: one[name] for name in alias} == alias


async def test_an_alias_outlives_the_box_and_goes_with_rm(tmp_path: Path) -> None:
    net, home = MemoryNetwork(), tmp_path / "anna"
    async with in_process_box(net, home, (FAKE,)) as box:
        await done(box, "copy", source=FAKE, destination="mine")
        await done(box, "copy", source="mine", destination="mine-too")  # leads to the model itself
    async with in_process_box(net, home, (FAKE,)) as box:
        assert (await box.chat(model="mine-too")).status_code == 200
        gone = await done(box, "delete", model="mine")
        assert (gone["model"], gone["alias_of"], gone["files"]) == ("mine", FAKE, [])
        assert (await box.chat(model="mine")).status_code == 404
        assert (await box.chat(model="mine-too")).json()["model"] == FAKE
        actions = [(one.action, one.target) for one in await audit.ls(box.box.database)]
        assert ("model.copy", "mine-too") in actions and ("model.delete", "mine") in actions


async def test_an_alias_gives_no_more_rights_than_its_model(anna: InProcessBox) -> None:
    await done(anna, "copy", source=FAKE, destination="nick")
    for allowed, model in (((FAKE,), True), (("nick",), False), (("other:*",), False)):
        secret = await key(anna, *allowed)
        answer = await anna.chat(model="nick", secret=secret)
        assert answer.status_code == (200 if model else 403), allowed
        assert ("nick" in await names(anna, secret)) is model
        one = await anna.http("GET", "/v1/models/nick", secret=secret)
        assert one.status_code == (200 if model else 403)


async def test_aliases_that_are_made_at_once_are_all_kept(anna: InProcessBox) -> None:
    names = [f"nick{number}" for number in range(8)]
    await asyncio.gather(*(done(anna, "copy", source=FAKE, destination=name) for name in names))
    assert [alias for alias, _ in anna.box.catalog.aliases.items()] == names
    with patch.object(alias_file, "MAX_ALIASES", 8):
        status, message = await refusal(anna, "copy", source=FAKE, destination="one-more")
    assert status == 409 and "the most" in message
    assert (await anna.chat(model="nick0")).status_code == 200


@pytest.mark.parametrize(
    ("source", "alias", "status", "says"),
    [
        ("nobody:1", "x", 404, "not served"),
        (FAKE, "tiny:1b", 409, "tiny:1b is a model"),
        (FAKE, "a b", 422, "not a name of a model"),
        (FAKE, "of-the-file", 409, "change it in the configuration"),
        (FAKE, "made", 409, "pinaivu rm made"),
        (FAKE, "made:latest", 409, "pinaivu rm made"),
        (FAKE, FAKE, 409, "choose another name"),
    ],
)
async def test_a_name_that_is_taken_makes_no_alias(
    tmp_path: Path, source: str, alias: str, status: int, says: str
) -> None:
    put_model(tmp_path / "anna")
    async with in_process_box(
        MemoryNetwork(), tmp_path / "anna", (FAKE,), aliases={"of-the-file": "tiny:1b"}
    ) as box:
        await done(box, "copy", source="tiny:1b", destination="made")
        code, message = await refusal(box, "copy", source=source, destination=alias)
        assert code == status and says in message


async def test_an_alias_of_the_configuration_counts_first_and_is_removed_there(
    tmp_path: Path,
) -> None:
    net, home = MemoryNetwork(), tmp_path / "anna"
    put_model(home)
    async with in_process_box(net, home, (FAKE,)) as box:
        await done(box, "copy", source="tiny:1b", destination="gpt")
    async with in_process_box(net, home, (FAKE,), aliases={"gpt": FAKE}) as box:
        assert (await box.chat(model="gpt")).json()["model"] == FAKE
        status, message = await refusal(box, "delete", model="gpt")
        assert status == 409 and "configuration" in message


async def test_a_file_that_has_the_name_of_an_alias_is_not_served(anna: InProcessBox) -> None:
    await done(anna, "copy", source=FAKE, destination="new:1b")
    put_model(anna.box.home, "new:1b")
    await anna.box.look_for_models()
    assert (await anna.chat(model="new:1b")).json()["model"] == FAKE
    listed = (await anna.http("GET", "/v1/admin/models")).json()
    (why,) = [one["reason"] for one in listed["not_served"]]
    assert "alias of fake:1" in why
    status, message = await refusal(anna, "pull", model="new:1b")
    assert status == 409 and "pinaivu rm new:1b" in message


async def test_an_alias_whose_model_is_gone_says_where_it_led(anna: InProcessBox) -> None:
    await done(anna, "copy", source="tiny:1b", destination="nick")
    gone = await done(anna, "delete", model="tiny:1b")
    assert gone["aliases"] == ["nick"]
    answer = await anna.chat(model="nick")
    assert answer.status_code == 404
    assert "'nick' is an alias of tiny:1b" in answer.json()["error"]["message"]
    assert "nick" not in await names(anna)


async def test_an_alias_may_lead_to_a_model_of_a_peer(tmp_path: Path) -> None:
    net = MemoryNetwork()
    async with (
        in_process_box(net, tmp_path / "anna") as anna,
        in_process_box(net, tmp_path / "ben", (FAKE,)) as ben,
    ):
        await soon(ben.network.join(await anna.network.invite()))
        await wait_until(lambda: count_offers(anna) == 1)
        await done(anna, "copy", source=FAKE, destination="far")
        answer = (await anna.chat(model="far")).json()
        assert answer["model"] == FAKE and "far" in await names(anna)
        assert "far" not in await names(ben)
        for action in ("delete", "unload", "load"):
            status, message = await refusal(anna, action, model=FAKE)
            assert status == 409 and "not on this box" in message


@pytest.mark.parametrize(
    "aliases", ['"a b" = "x:1"', '"x" = "x"', '"x" = "y"\n"y" = "z:1"', '"fake:1" = "z:1"']
)
def test_aliases_of_the_configuration_that_lead_nowhere_are_refused(
    tmp_path: Path, aliases: str
) -> None:
    (tmp_path / "config.toml").write_text(
        f'[aliases]\n{aliases}\n[[model]]\nname = "fake:1"\npath = "fake:1"\n'
    )
    done = run_command("ls", home=tmp_path, check=False)
    assert done.returncode == 1 and "alias" in done.stderr and "Traceback" not in done.stderr


# -- descriptions ----------------------------------------------------------------------------------


async def test_a_model_is_described_alike_with_and_without_a_server(tmp_path: Path) -> None:
    home = tmp_path / "anna"
    put_model(
        home,
        source="registry.example/tiny:1b",
        license=LICENSE,
        system="You are tiny.",
        parameters=ModelParameters(temperature=0.25, num_ctx=1024, stop=("<end>",)),
    )
    async with in_process_box(MemoryNetwork(), home, (FAKE,)) as box:
        await done(box, "copy", source="tiny:1b", destination="nick")
        by_server = await done(box, "show", model="nick")
    by_files = run_command_json("show", "nick", home=home)
    assert by_server == by_files
    assert (by_files["model"], by_files["aliases"]) == ("tiny:1b", ["nick"])
    assert (by_files["architecture"], by_files["context"]) == ("llama", 1024)
    assert (by_files["template"], by_files["system"]) == ("of the file", "You are tiny.")
    assert by_files["license"] == "Be Nice License" and by_files["license_text"] == LICENSE
    assert by_files["settings"]["sampling"]["temperature"] == 0.25
    assert by_files["stop"] == ["<end>"]
    needs = by_files["memory"]
    assert [need["context"] for need in needs] == [2048, 4096]
    assert needs[0]["bytes"] <= needs[1]["bytes"]
    text = run_command("show", "nick", home=home).stdout
    assert "registry.example/tiny:1b" in text and "You are tiny." in text and "2,048" in text
    assert run_command("show", "nick", "--license", home=home).stdout.strip() == LICENSE


def test_a_description_creates_nothing_in_the_home(tmp_path: Path) -> None:
    put_model(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_command_json("show", "tiny:1b", home=tmp_path)["digest"] == ""
    assert sorted(tmp_path.rglob("*")) == before


async def test_the_settings_in_force_are_shown(tmp_path: Path) -> None:
    put_model(tmp_path)
    (tmp_path / "config.toml").write_text(
        '[engine]\nkeep_alive = "9m"\n[[model]]\nname = "tiny:1b"\ncontext = 512\npin = true\n'
    )
    settings = run_command_json("show", "tiny:1b", home=tmp_path)["settings"]
    assert (settings["context"], settings["keep_alive"], settings["pin"]) == (512, "9m", True)
    assert settings["parallel"] == config.EngineConfig().max_sequences


# -- loading and deleting --------------------------------------------------------------------------


async def test_a_model_is_loaded_and_unloaded_by_name(anna: InProcessBox) -> None:
    await done(anna, "copy", source=FAKE, destination="nick")
    loaded = await done(anna, "load", model="nick", keep_alive="10m")
    assert loaded["model"] == FAKE and anna.box.placement.loaded == {FAKE}
    unloaded = await done(anna, "unload", model="nick")
    assert unloaded == {"model": FAKE, "unloaded": True, "running": 0}
    assert anna.box.placement.loaded == set()
    again = await done(anna, "unload", model=FAKE)
    assert again["unloaded"] is False
    actions = [one.action for one in await audit.ls(anna.box.database)]
    assert actions.count("model.load") == actions.count("model.unload") == 1


async def test_a_deleted_model_is_gone_with_its_record_and_folder(anna: InProcessBox) -> None:
    folder = anna.box.home / "models"
    gone = await done(anna, "delete", model="tiny:1b")
    assert gone["size"] == len(FILE) and gone["links"] == 0
    assert list(folder.iterdir()) == []
    assert "tiny:1b" not in await names(anna)
    assert (
        await anna.box.database.read("SELECT * FROM model_files WHERE path LIKE '%tiny%'")
    ) == []
    assert (await refusal(anna, "delete", model="tiny:1b"))[0] == 404


async def test_answers_that_run_finish_when_their_model_is_deleted(tmp_path: Path) -> None:
    location, file = bundled.find(), tmp_path / "anna" / "models" / "real:1.gguf"
    assert location is not None
    file.parent.mkdir(parents=True)
    with location.path.open("rb") as source:
        source.seek(location.offset)
        file.write_bytes(source.read(location.size))
    async with in_process_box(MemoryNetwork(), tmp_path / "anna") as anna:
        await done(anna, "load", model="real:1")
        asking = asyncio.create_task(anna.chat(model="real:1", max_tokens=80, ignore_eos=True))
        await wait_until(lambda: anna.box.requests.count == 1)
        gone = await done(anna, "delete", model="real:1")
        assert gone["running"] == 1 and not file.exists()
        assert (await anna.chat(model="real:1")).status_code == 404
        answer = await asking
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 80
        await wait_until(lambda: "real:1" not in anna.box.placement.loaded)


async def test_of_a_linked_file_the_link_alone_is_deleted(
    anna: InProcessBox, tmp_path: Path
) -> None:
    file = tmp_path / "mine:2.gguf"
    file.write_bytes(FILE)
    await post(anna, "pull", model=str(file))
    gone = await done(anna, "delete", model="mine:2")
    assert gone["links"] == 1 and file.exists()
    assert "mine:2" not in await names(anna)


async def test_all_parts_of_a_model_are_deleted(anna: InProcessBox) -> None:
    parts = [gguf_files.part(number, 2) for number in (1, 2)]
    gguf_files.put_split(anna.box.home / "models", "big:1", parts)
    await anna.box.look_for_models()
    assert len((await done(anna, "delete", model="big:1"))["files"]) == 2
    assert "big:1" not in await names(anna)


async def test_what_is_not_ours_is_not_deleted(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "anna", tmp_path / "elsewhere"
    file = put_model(elsewhere)
    other = home / "models"
    other.mkdir(parents=True)
    (other / "linked").symlink_to(file.parent)
    async with in_process_box(MemoryNetwork(), home, (FAKE,)) as box:
        status, message = await refusal(box, "delete", model=FAKE)
        assert status == 409 and "[[model]]" in message
        status, message = await refusal(box, "delete", model="tiny:1b")
        assert status == 409 and "not in the models folder" in message
        assert file.exists()


@pytest.mark.parametrize("action", ["show", "copy", "delete", "load", "unload", "pull"])
async def test_only_admins_may(anna: InProcessBox, action: str) -> None:
    secret = await key(anna)
    body = {"model": FAKE, "source": FAKE, "destination": "x"}
    answer = await anna.http("POST", f"/v1/admin/models/{action}", secret=secret, json=body)
    assert answer.status_code == 403


# -- commands --------------------------------------------------------------------------------------


def test_commands_work_on_a_home_without_a_server(tmp_path: Path) -> None:
    file = put_model(tmp_path)
    assert run_command("cp", "tiny:1b", "nick", home=tmp_path).stdout == (
        "nick is an alias of tiny:1b.\n"
    )
    assert "nick" in run_command("ls", home=tmp_path).stdout
    assert run_command_json("ls", home=tmp_path)[0]["aliases"] == ["nick"]
    refused = run_command("rm", "tiny:1b", home=tmp_path, check=False)
    assert refused.returncode == 2 and "--yes" in refused.stderr and file.exists()
    gone = run_command("rm", "tiny:1b", "--yes", home=tmp_path)
    assert "tiny:1b is deleted" in gone.stdout and "nick" in gone.stderr
    assert not file.exists()
    assert "no alias" in run_command("rm", "nick", "--yes", home=tmp_path).stdout
    missing = run_command("rm", "nick", "--yes", home=tmp_path, check=False)
    assert missing.returncode == 1 and "not served" in missing.stderr
    stopped = run_command("stop", "tiny:1b", home=tmp_path, check=False)
    assert stopped.returncode == 1 and "No box is running" in stopped.stderr
