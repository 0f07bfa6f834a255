"""`pinaivu pull` between real boxes: processes with homes of their own, links by iroh."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.support import gguf_files
from tests.support.in_process_command import run_command, run_command_json
from tests.support.model_copies import digest_of, made_up
from tests.support.peer_box import MakePeerBox, PeerBox, joined_boxes
from tests.support.process_box import PINAIVU, Box, environment, wait_until

NAME = "made:up"
LARGE = 96 * 1024 * 1024


def put(box: PeerBox, data: bytes, name: str = NAME) -> None:
    (box.home / "models").mkdir(exist_ok=True)
    (box.home / "models" / f"{name}.gguf").write_bytes(data)
    run_command("reload", home=box.home)


def slowly(box: PeerBox) -> None:
    """What it gives from now on takes its time: five seconds for a large one."""
    config = box.home / "config.toml"
    config.write_text(config.read_text() + "[peering.serve]\ncopy_mb_per_s = 20\n")
    run_command("reload", home=box.home)


def offers(box: PeerBox, peer: str, model: str) -> bool:
    return model in [one["id"] for one in box.listed()[peer]["models"]]


def begun(box: Box) -> Path | None:
    """The unfinished copy, once something of it is there."""
    found = [one for one in (box.home / "models").glob(".partial/*") if one.stat().st_blocks]
    return found[0] if found else None


def pulling(box: Box, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PINAIVU, "pull", NAME, "--from", "any", "--json", "--home", str(box.home), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Whoever runs the tests in the background has told its children to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_model_goes_to_another_box_and_on_to_a_third(member: MakePeerBox) -> None:
    anna, ben, carl = joined_boxes(member, "anna", "ben", "carl")
    data = made_up(1)
    put(anna, data)
    wait_until(lambda: offers(ben, "anna", NAME), "it is offered")
    said = run_command("pull", NAME, "--from", "anna", home=ben.home).stdout
    assert said == "made:up is served: 38 MB from anna\n"
    listed = {one["id"]: one for one in run_command_json("ls", home=ben.home)}
    assert digest_of(Path(listed[NAME]["path"]).read_bytes()) == digest_of(data)
    assert NAME in {model.id for model in ben.client.models.list().data}
    wait_until(lambda: offers(carl, "ben", NAME) and offers(carl, "anna", NAME), "both offer it")
    done = pulling(carl)
    lines = [json.loads(line) for line in done.communicate(timeout=300)[0].splitlines()]
    assert {one["name"]: one["bytes"] > 0 for one in lines[-1]["sources"]} == {
        "anna": True,
        "ben": True,
    }
    (entry,) = [one for one in run_command_json("audit", home=carl.home) if "pull" in one["action"]]
    assert (entry["action"], entry["detail"]["digest"]) == ("model.pull", digest_of(data))
    # In several files it is one model, to whom it is offered and who pulls it.
    parts = [
        gguf_files.part(number, 3, tensors=3) + made_up(number, 100_000) for number in (1, 2, 3)
    ]
    gguf_files.put_split(anna.home / "models" / "publisher", "split", parts)
    run_command("reload", home=anna.home)
    wait_until(lambda: offers(ben, "anna", "split:latest"), "it is offered")
    run_command("pull", "split", "--from", "anna", home=ben.home)
    (pulled,) = [
        one for one in run_command_json("ls", home=ben.home) if one["id"] == "split:latest"
    ]
    came = [digest_of(Path(path).read_bytes()) for path in pulled["files"]]
    assert came == [digest_of(data) for data in parts]


def test_a_box_that_is_killed_in_the_middle_goes_on(member: MakePeerBox) -> None:
    anna, ben = joined_boxes(member, "anna", "ben")
    data = made_up(1, LARGE)
    slowly(anna)
    put(anna, data)
    wait_until(lambda: offers(ben, "anna", NAME), "it is offered")
    first = pulling(ben)
    wait_until(lambda: begun(ben), "the copy has begun")
    ben.kill()
    out, error = first.communicate(timeout=300)
    assert first.returncode == 1 and "The box stopped" in error and '"done"' not in out
    ben.start()
    wait_until(lambda: ben.sees("anna") and offers(ben, "anna", NAME), "they met again")
    run_command("pull", NAME, "--from", "any", home=ben.home)
    copied = ben.home / "models" / f"{NAME}.gguf"
    assert digest_of(copied.read_bytes()) == digest_of(data)


def test_ctrl_c_stops_the_copy_and_keeps_what_has_come(member: MakePeerBox) -> None:
    anna, ben = joined_boxes(member, "anna", "ben")
    slowly(anna)
    put(anna, made_up(1, LARGE))
    wait_until(lambda: offers(ben, "anna", NAME), "it is offered")
    first = pulling(ben)
    partial = wait_until(lambda: begun(ben), "the copy has begun")
    first.send_signal(signal.SIGINT)
    assert first.wait(300) == 130
    # Whoever can take it again at once was not kept out by a copy that still runs.
    done: list[Any] = []

    def again() -> bool:
        more = pulling(ben)
        done[:] = more.communicate(timeout=300)[0].splitlines()
        return more.returncode == 0

    wait_until(again, "it can be pulled again")
    last = json.loads(done[-1])
    assert last["state"] == "done" and not partial.exists()
    assert sum(one["bytes"] for one in last["sources"]) < LARGE


def test_a_peer_gets_no_model_that_its_limits_exclude(member: MakePeerBox) -> None:
    anna, ben = joined_boxes(member, "anna", "ben")
    put(anna, made_up(1))
    wait_until(lambda: offers(ben, "anna", NAME), "it is offered")

    def refused() -> str:
        done = run_command("pull", NAME, "--from", "anna", home=ben.home, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        return str(done.stderr)

    anna.peers("edit", "ben", "--model", "fake:*")
    assert "is not served here" in refused()
    anna.peers("edit", "ben", "--model", "none", "--block", "unpaid")
    assert "serves nothing to your box: unpaid" in refused()
    anna.peers("edit", "ben", "--unblock", "--hours", "00:00-00:00")
    assert "serves its peers from 00:00-00:00 only" in refused()
    anna.peers("edit", "ben", "--hours", "none")
    config = anna.home / "config.toml"
    config.write_text(config.read_text() + "share_models = false\n")
    run_command("reload", home=anna.home)
    assert "does not share its models with yours" in refused()
