"""The configuration read again: by command and by signal, without dropping a request."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, wait_until

USER = [{"role": "user", "content": "hi"}]
FIRST = '[pricing]\nper_1k_tokens = "1"\n[[model]]\nname = "slow:1"\npath = "fake:20"\n'


@pytest.fixture
def box(new_box: Any, tmp_path: Path) -> Box:
    config = tmp_path / "box.toml"
    config.write_text(FIRST)
    started: Box = new_box("--config", str(config))
    return started


def configure(box: Box, text: str) -> None:
    Path(box.args[1]).write_text(text)


def ask(box: Box, **more: Any) -> Any:
    options = {"model": "slow:1", "messages": USER, "max_tokens": 5, **more}
    return box.client.chat.completions.create(**options)


def price(box: Box, answer: Any) -> str:
    receipt = box.http("GET", f"/v1/receipts/{answer.request_id}").json()
    signed = json.loads(receipt["signed_receipt"])
    made: str = json.loads(signed["proofs"][0]["signed"])["price"]["completion"]
    return made


def test_a_reload_reports_which_settings_apply_now_later_or_after_a_restart(box: Box) -> None:
    assert price(box, ask(box)) == "1"
    with ask(box, stream=True, max_tokens=150) as running:
        next(iter(running))
        configure(
            box,
            FIRST.replace('"1"', '"2"', 1).replace(
                "[pricing]",
                "[server]\nport = 5\n[engine]\nmax_queue = 3\ntoken_budget = 64\n[pricing]",
            )
            + '[[model]]\nname = "new:1"\npath = "fake:0"\n',
        )
        done = run_command_json("reload", home=box.home)
        assert set(done["applied"]) == {"pricing.per_1k_tokens", "engine.max_queue", "model"}
        assert done["engines"] == ["engine.token_budget"]
        assert done["restart"] == []  # --port 0 of the command line is what counts
        assert {"slow:1", "new:1"} <= set(done["models"])
        # Nothing was dropped: the stream that ran goes on to its end.
        chunks = list(running)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert price(box, ask(box)) == "2"
    assert ask(box, model="new:1").choices
    assert run_command("reload", home=box.home).stdout.startswith("no setting has changed")


def test_a_setting_of_the_socket_is_named_as_not_changed(box: Box) -> None:
    configure(box, '[server]\nhost = "127.0.0.2"\ncors_origins = ["https://a.example"]\n' + FIRST)
    done = run_command_json("reload", home=box.home)
    assert set(done["restart"]) == {"server.host", "server.cors_origins"}
    printed = run_command("reload", home=box.home).stdout  # it stays said until it is done
    assert "server.host takes effect when the box is restarted" in printed
    assert ask(box).choices


@pytest.mark.parametrize(
    "wrong",
    [
        "[pricing\n",
        '[pricing]\nper_1k_tokens = "free"\n',
        '[[model]]\nname = "a:1"\npath = "/none"\n',
        # All is valid but what is read last.
        '[engine]\nshared_prefixes = [{ file = "/none" }]\n' + FIRST.replace('"1"', '"9"', 1),
    ],
)
def test_a_configuration_that_is_not_valid_changes_nothing(box: Box, wrong: str) -> None:
    configure(box, wrong)
    done = run_command("reload", home=box.home, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert price(box, ask(box)) == "1"
    box.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "not reloaded" in box.errors, "the log to say why")
    assert price(box, ask(box)) == "1"


def test_sighup_does_the_same(box: Box) -> None:
    configure(box, FIRST.replace('"1"', '"3"', 1))
    box.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in box.errors, "the log to say it")
    assert price(box, ask(box)) == "3"


def test_a_command_without_a_server_says_so(tmp_path: Path) -> None:
    done = run_command("reload", home=tmp_path / "home", check=False)
    assert done.returncode == 1 and "No box is running" in done.stderr


def test_only_an_admin_may(box: Box) -> None:
    plain = run_command_json("keys", "create", home=box.home)["key"]
    assert box.http("POST", "/v1/admin/reload", key=plain).status_code == 403
    assert box.http("POST", "/v1/admin/reload").json()["restart"] == []
