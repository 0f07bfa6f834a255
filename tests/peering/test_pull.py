"""`pinaivu pull` and what it asks the box for: a model on one box becomes a model on another."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pinaivu_box.box import Box as OpenBox
from pinaivu_box.box_services import open_box
from pinaivu_box.config import Config
from pinaivu_box.errors import PeerNotFound
from pinaivu_box.files.upload import FileServer
from pinaivu_box.gossip.adverts import Advert
from pinaivu_box.models import catalog
from pinaivu_box.models.model_copy import copy_model
from pinaivu_box.models.splits import digest_of_parts
from pinaivu_box.server.app import create_app
from pinaivu_box.store import audit
from tests.support import gguf_files
from tests.support.in_process_command import run_command
from tests.support.model_copies import NAME, SIZE, CopyNetwork, WrongPieces, digest_of, made_up
from tests.support.process_box import Box
from tests.support.records import offer
from tests.support.waiting import soon, wait_until

pytestmark = pytest.mark.anyio
DATA = made_up(1)
DIGEST = digest_of(DATA)


@dataclass(frozen=True)
class Met:
    """A peer as a network shows it."""

    node_id: str
    name: str
    advert: Advert | None
    state: str = "connected"
    gone: bool = False


class Network:
    """What a pull needs of `peering.network.Network`, over links in memory."""

    def __init__(self, world: CopyNetwork) -> None:
        self.world, self.met, self.changes = world, dict[str, Met](), 0

    def meet(self, source: Any, **models: bytes | str) -> None:
        """Models by their file or its digest."""
        offers = tuple(
            offer(
                name.replace("_", ":"),
                digest=bytes.fromhex(data if isinstance(data, str) else digest_of(data)),
            )
            for name, data in models.items()
        )
        advert = Advert(bytes(36), bytes(32), 1, 0, 15, "1", (), "credits", offers)
        self.met[source.name] = Met(source.peer, source.name, advert)

    async def open(self, peer: str, purpose: str) -> Any:
        assert purpose == "model"
        return await self.world.open(peer)

    def peers(self) -> list[Any]:
        return list(self.met.values())

    def peer(self, name: str) -> Any:
        if name not in self.met:
            raise PeerNotFound(f"There is no peer {name}.")
        return self.met[name]

    def changed(self) -> None:
        self.changes += 1


class Puller:
    """A box that is asked over HTTP."""

    def __init__(self, box: OpenBox, world: CopyNetwork) -> None:
        self.box, self.world = box, world
        network: Any = Network(world)
        self.network = box.network = network
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(box)),
            base_url="http://box",
            headers={"Authorization": f"Bearer {box.control_token}"},
        )

    async def giver(self, data: bytes, kind: Any = None, name: str = "anna") -> Any:
        made = await self.world.giver(data, kind or FileServer, name)
        self.network.meet(made.source, made_up=data)
        return made

    async def asked(self, **body: Any) -> httpx.Response:
        answer: httpx.Response = await soon(self.http.post("/v1/admin/models/pull", json=body))
        return answer

    async def pull(self, **body: Any) -> dict[str, Any]:
        """The last line."""
        answer = await self.asked(**{"model": NAME, "from": "any", **body})
        assert answer.status_code == 200, answer.text
        last: dict[str, Any] = json.loads(answer.text.splitlines()[-1])
        return last

    async def refused(self, **body: Any) -> tuple[int, str]:
        answer = await self.asked(**{"model": NAME, "from": "any", **body})
        return answer.status_code, answer.json()["error"]["message"]


@pytest.fixture
async def puller(tmp_path: Path) -> AsyncIterator[Puller]:
    world = CopyNetwork(tmp_path)
    async with open_box(Config, tmp_path / "ours") as box:
        made = Puller(box, world)
        yield made
        await made.http.aclose()
        await world.end()


async def test_a_pulled_model_is_served_at_once_and_told_of(puller: Puller) -> None:
    await puller.giver(DATA)
    assert not puller.box.catalog.models or NAME not in {m.id for m in puller.box.catalog.models}
    done = await puller.pull()
    assert (done["state"], done["bytes"], done["digest"]) == ("done", SIZE, DIGEST)
    assert [(one["name"], one["bytes"]) for one in done["sources"]] == [("anna", SIZE)]
    served = (await puller.http.get("/v1/models")).json()["data"]
    assert NAME in {model["id"] for model in served} and puller.network.changes == 1
    assert digest_of(puller.box.catalog.find(NAME).path.read_bytes()) == DIGEST
    (entry,) = await audit.ls(puller.box.database)
    assert (entry.action, entry.target, entry.detail["from"]) == ("model.pull", NAME, ["anna"])


async def test_peers_are_told_of_what_comes_into_the_folder_and_goes(puller: Puller) -> None:
    file = puller.box.home / "models" / "new:1.gguf"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(DATA)
    await wait_until(lambda: puller.network.changes == 1)
    assert puller.box.catalog.find("new:1").path == file
    file.unlink()
    await wait_until(lambda: puller.network.changes == 2)
    assert "new:1" not in {model.id for model in puller.box.catalog.models}


async def test_a_model_in_several_files_is_served_at_once_too(puller: Puller) -> None:
    giver = await puller.world.giver(None, name="anna")
    parts = [gguf_files.part(1, 2), gguf_files.part(2, 2) + made_up(3, 100_000)]
    gguf_files.put_split(giver.folder, NAME, parts)
    digest = digest_of_parts([digest_of(data) for data in parts])
    puller.network.meet(giver.source, made_up=digest)
    done = await puller.pull()
    assert (done["state"], done["bytes"], done["digest"]) == (
        "done",
        sum(map(len, parts)),
        digest,
    )
    listed = (await puller.http.get("/v1/admin/models")).json()
    (model,) = [one for one in listed["data"] if one["id"] == NAME]
    held = puller.box.catalog.find(NAME)
    assert [digest_of(file.path.read_bytes()) for file in held.files] == [*map(digest_of, parts)]
    assert [str(file.path) for file in held.files] == model["files"]
    # They were checked as they came: nobody reads them again to know their digest.
    rows = await puller.box.database.read(
        "SELECT path, digest FROM model_files WHERE path LIKE '%made:up%' ORDER BY path"
    )
    assert [(row["path"], row["digest"]) for row in rows] == [
        (path, digest_of(data)) for path, data in zip(model["files"], parts, strict=True)
    ]
    again = await puller.pull()
    assert again["state"] == "done" and "already, as made:up" in again["message"]


async def test_a_model_that_is_here_is_not_copied_again(puller: Puller) -> None:
    await puller.giver(DATA)
    await puller.pull()
    again = await puller.pull()
    assert again["state"] == "done" and "already, as made:up" in again["message"]
    assert len(await audit.ls(puller.box.database)) == 1


async def test_a_model_that_is_here_gets_the_name_that_was_asked_for(puller: Puller) -> None:
    await puller.giver(DATA)
    first = await puller.pull()
    named = await puller.pull(**{"as": "other:1"})
    assert (named["state"], named["model"], named["sources"]) == ("done", "other:1", [])
    assert f"already, as {first['model']}, and serves it as other:1 too" in named["message"]
    served = (await puller.http.get("/v1/models")).json()["data"]
    assert {NAME, "other:1"} <= {model["id"] for model in served}
    new = puller.box.catalog.find("other:1")
    assert digest_of(new.path.read_bytes()) == await puller.box.digests.of(new) == DIGEST
    assert puller.network.changes == 2  # it is offered to others
    newest, _ = await audit.ls(puller.box.database)
    assert (newest.target, newest.detail["same_as"]) == ("other:1", NAME)
    # The file of one name may go: the other is still there.
    puller.box.catalog.find(NAME).path.unlink()
    await puller.box.look_for_models()
    assert digest_of(puller.box.catalog.find("other:1").path.read_bytes()) == DIGEST
    # It is called so now: nothing is left to do, with its tag or without.
    for name in ("other:1", "made:up"):
        again = await puller.pull(**{"as": name})
        assert again["state"] == "done"
    assert {path.name for path in new.path.parent.glob("*")} >= {"other:1.gguf", "made:up.gguf"}


async def test_a_name_that_another_file_has_is_not_taken_from_it(puller: Puller) -> None:
    await puller.giver(DATA)
    await puller.pull()
    other = await puller.world.giver(made_up(2), name="ben")
    puller.network.meet(other.source, made_up=made_up(2))
    await puller.pull(**{"from": "ben", "as": "other:file"})
    status, said = await puller.refused(**{"from": "anna", "as": "other:file"})
    assert status == 409 and "another file as other:file" in said
    assert digest_of(puller.box.catalog.find("other:file").path.read_bytes()) != DIGEST


def test_a_model_inside_a_larger_file_is_copied_out_of_it(tmp_path: Path) -> None:
    """As the bundled one is in the executable."""
    whole = tmp_path / "executable"
    whole.write_bytes(b"before" + DATA + b"after")
    inside = catalog.remote("inside:1", DIGEST)
    inside = replace(inside, path=whole, offset=6, size=len(DATA), remote=False)
    folder = tmp_path / "models"
    assert copy_model(inside, folder, "out:1") == [folder / "out:1.gguf"]
    assert digest_of((folder / "out:1.gguf").read_bytes()) == DIGEST
    with pytest.raises(FileExistsError):
        copy_model(inside, folder, "out:1")
    assert [path.name for path in folder.iterdir()] == ["out:1.gguf"]


async def test_a_source_with_wrong_data_is_named_in_the_last_line(puller: Puller) -> None:
    await puller.giver(DATA)
    await puller.giver(DATA, WrongPieces, name="eve")
    done = await puller.pull()
    assert done["state"] == "done"
    assert {one["name"]: bool(one["left_out"]) for one in done["sources"]} == {
        "anna": False,
        "eve": True,
    }


async def test_a_failure_is_the_last_line(puller: Puller) -> None:
    await puller.giver(DATA, WrongPieces, name="eve")
    done = await puller.pull()
    assert done["state"] == "failed" and "eve: it sent a wrong piece" in done["message"]


async def test_another_name_for_it(puller: Puller) -> None:
    await puller.giver(DATA)
    mine = puller.box.home / "models" / "made:up.gguf"
    mine.parent.mkdir()
    mine.write_bytes(made_up(2, 1000))
    await puller.box.look_for_models()
    status, message = await puller.refused()
    assert status == 409 and "another file as made:up" in message and "--as" in message
    assert (await puller.pull(**{"as": "theirs"}))["model"] == "theirs:latest"
    assert mine.read_bytes() == made_up(2, 1000)
    assert puller.box.catalog.find("theirs").size == SIZE


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/cron.d/x", "a/../../b", "owner/model:1", "a\0b", "a b", ".partial/x"]
)
async def test_names_that_are_paths(puller: Puller, name: str) -> None:
    await puller.giver(DATA)
    for body in ({"model": name, "digest": DIGEST}, {"as": name}):
        status, _ = await puller.refused(**body)
        assert status == 422
    assert not (puller.box.home / "models").exists()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"from": "nobody"}, 404, "There is no peer nobody"),
        ({"model": "other:1"}, 404, "No peer offers other:1. Offered: made:up."),
        ({"model": "other:1", "from": "anna"}, 409, "No peer provides other:1 (anna: The model"),
        ({"digest": "abc"}, 422, "8 to 64"),
        ({"digest": "0" * 64}, 404, "No peer offers"),
        ({"model": ""}, 422, "length"),
    ],
)
async def test_a_pull_that_is_not_possible_is_refused(
    puller: Puller, body: dict[str, Any], status: int, said: str
) -> None:
    await puller.giver(DATA)
    found, message = await puller.refused(**body)
    assert found == status and said in message


async def test_two_files_under_one_name_ask_for_the_digest(puller: Puller) -> None:
    await puller.giver(DATA)
    await puller.giver(made_up(2, 5000), name="ben")
    status, message = await puller.refused()
    assert status == 409 and "--digest" in message and "ben" in message
    assert (await puller.pull(digest=DIGEST[:10]))["state"] == "done"


async def test_a_file_that_is_no_model_is_not_given(puller: Puller) -> None:
    await puller.giver(DATA)
    await puller.giver(b"no GGUF at all" * 1000, name="ben")
    ben = puller.world.givers[1]
    assert ben.folder.exists()
    status, message = await puller.refused(**{"from": "ben"})
    assert status == 409 and "ben" in message


# -- the command -----------------------------------------------------------------------------------


async def test_the_command_needs_a_running_box(tmp_path: Path) -> None:
    done = run_command("pull", "m:1", "--from", "any", home=tmp_path / "home", check=False)
    assert done.returncode == 1
    assert "No box is running" in done.stderr and "pinaivu serve" in done.stderr


async def test_the_command_says_that_peering_is_off(new_box: Callable[..., Box]) -> None:
    box = new_box("--model", "fake:1=fake:0")
    done = run_command("pull", "m:1", "--from", "any", home=box.home, check=False)
    assert done.returncode == 1 and "Peering is off" in done.stderr and "--peering" in done.stderr
    assert done.stderr.count("\n") == 1


async def test_the_command_needs_a_box_that_runs(tmp_path: Path) -> None:
    done = run_command("pull", "m:1", home=tmp_path / "home", check=False)
    assert done.returncode == 1 and "pinaivu serve" in done.stderr


async def test_a_key_without_the_scope_may_not(new_box: Callable[..., Box]) -> None:
    box = new_box("--model", "fake:1=fake:0")
    made = box.http("POST", "/v1/admin/keys", json={"name": "app"}).json()
    answer = box.http("POST", "/v1/admin/models/pull", key=made["key"], json={"model": "m:1"})
    assert answer.status_code == 403
