"""`pinaivu serve` from its first start on: what it prints, refuses, shows, loads and logs."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pinaivu_box.errors import ConfigurationInvalid
from pinaivu_box.models import bundled
from pinaivu_box.store.keys import generate
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import (
    MODEL,
    PINAIVU,
    UNDRAFTED,
    Box,
    alive,
    environment,
    wait_until,
)

SECRET = re.compile(r"sk-pnv-[0-9A-Za-z]+")
FAKE = ("--model", "fake:1=fake:0")
# Bounds the answers of the printed examples, which set no limit.
SMALL_CONTEXT = "[engine]\ncontext = 80\n"
NewBox = Callable[..., Box]


def ask(box: Box, model: str = "fake:1", text: str = "hi", tokens: int = 4, **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    response = box.http("POST", "/v1/chat/completions", json={**body, **more})
    assert response.status_code == 200, response.text
    return response.json() if not more.get("stream") else response.text


@pytest.fixture(scope="module")
def gguf() -> Path:
    """A real model's file."""
    found = bundled.find()
    assert found, "the bundled model is not installed"
    assert found.offset == 0
    return found.path


# -- the first and the second start --------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Box, str, str]]:
    """A box started twice, with what it printed each time."""
    home = tmp_path_factory.mktemp("serve") / "home"
    home.mkdir()
    (home / "config.toml").write_text(SMALL_CONTEXT)
    box = Box(home).start()
    first = box.output
    assert box.stop() == 0
    box.start()
    yield box, first, box.output
    box.end()


def between(text: str, before: str, after: str) -> str:
    return textwrap.dedent(text.split(before, 1)[1].split(after, 1)[0])


def run_curl(output: str, **variables: str) -> dict[str, Any]:
    command = between(output, "curl:\n", "or with Python")
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, timeout=300, env=environment(**variables)
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def run_python(output: str, **variables: str) -> str:
    code = textwrap.dedent(output.split("(pip install openai):\n", 1)[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**variables),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_first_start_prints_base_url_and_key(started: tuple[Box, str, str]) -> None:
    _, first, _ = started
    assert re.search(r"http://localhost:\d+/v1\b", first)
    assert len(set(SECRET.findall(first))) == 1
    assert MODEL in first


def test_without_peering_its_library_is_not_in_memory(started: tuple[Box, str, str]) -> None:
    box, *_ = started
    loaded = Path(f"/proc/{box.process.pid}/maps").read_text()
    assert "nacl" in loaded
    assert "iroh" not in loaded and "zeroconf" not in loaded


def test_commands_that_the_first_start_prints_work_when_pasted(
    tmp_path: Path, new_box: NewBox
) -> None:
    config = tmp_path / "box.toml"
    config.write_text(SMALL_CONTEXT)
    box = new_box("--config", str(config))
    if shutil.which("curl"):
        assert run_curl(box.output)["choices"][0]["message"]["content"].strip()
    assert run_python(box.output)


def test_the_second_start_prints_all_but_the_key(started: tuple[Box, str, str]) -> None:
    _, first, second = started
    assert not SECRET.search(second)
    same = [line for line in second.splitlines() if line in first.splitlines()]
    assert len(same) >= len(second.splitlines()) - 7  # the port, the key and `import os` differ
    assert re.search(r"http://localhost:\d+/v1\b", second)
    assert "curl" in second


def test_commands_that_the_second_start_prints_work_when_pasted(
    started: tuple[Box, str, str],
) -> None:
    """With the key in the environment, as it says."""
    _, first, second = started
    key = SECRET.findall(first)[0]
    if shutil.which("curl"):
        answer = run_curl(second, PINAIVU_API_KEY=key)
        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["request_id"].startswith("req_")
    assert run_python(second, PINAIVU_API_KEY=key)


def test_a_home_made_on_the_way_has_an_identity_that_stays(new_box: NewBox) -> None:
    box = new_box(*FAKE)
    node = ask_receipt(box)
    identity = (box.home / "identity.key").read_bytes()
    assert box.stop() == 0
    box.start()
    assert (box.home / "identity.key").read_bytes() == identity
    assert ask_receipt(box) == node


def ask_receipt(box: Box) -> str:
    node: str = box.http("GET", f"/v1/receipts/{ask(box)['request_id']}").json()["node_id"]
    return node


def test_host_0_0_0_0_serves_every_address(new_box: NewBox) -> None:
    box = new_box("--host", "0.0.0.0")
    printed = re.search(r"http://\S+/v1\b", box.output)
    assert printed
    for base in (printed[0], f"http://127.0.0.1:{box.url.rsplit(':', 1)[1]}/v1"):
        headers = {"Authorization": f"Bearer {box.key}"}
        answer = httpx.get(f"{base}/models", headers=headers, trust_env=False, timeout=300)
        assert answer.status_code == 200


def test_without_a_host_only_this_machine_is_served(new_box: NewBox) -> None:
    box = new_box()
    port = int(box.url.rsplit(":", 1)[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        socket.create_connection((address, port), timeout=5).close()


def test_the_running_file_goes_when_the_server_does(new_box: NewBox) -> None:
    box = new_box()
    assert json.loads((box.home / "run.json").read_text())["pid"] == box.process.pid
    assert box.stop() == 0
    assert not (box.home / "run.json").exists()


INVALID = ConfigurationInvalid.exit_code

# -- starts that are refused ---------------------------------------------------------------------


def refused(*args: str, home: Path, env: dict[str, str] | None = None, status: int = 1) -> str:
    """`serve` exits so, with exactly one line on stderr and nothing on stdout; the line."""
    done = subprocess.run(
        [*PINAIVU, "serve", "--home", str(home), "--port", "0", *args],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**env or {}),
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status, (done.returncode, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pinaivu: ")
    return line


def test_an_address_in_use(tmp_path: Path) -> None:
    """And the home is left without a key that nobody has seen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refused("--port", port, home=tmp_path / "home")
    assert run_command_json("keys", "ls", home=tmp_path / "home") == []


@pytest.mark.parametrize(
    ("args", "named", "status"),
    [
        (("--host", "203.0.113.1"), "203.0.113.1", 1),
        (("--port", "70000"), "server.port", INVALID),
        (("--port", "-1"), "server.port", INVALID),
    ],
)
def test_an_address_that_cannot_be(
    tmp_path: Path, args: tuple[str, ...], named: str, status: int
) -> None:
    assert named in refused(*args, home=tmp_path / "home", status=status)


@pytest.mark.parametrize("path", ["/nowhere/config.toml", "/proc/self/mem"])
def test_a_config_that_cannot_be_read(tmp_path: Path, path: str) -> None:
    assert path in refused("--config", path, home=tmp_path / "home")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"[server\n", ""),
        (b"port = = 4", ""),
        (b"\xff\xfe", ""),
        (b"[server]\nprot = 4001\n", "prot"),
        (b"colour = 1\n", "colour"),
        (b"server = 1\n", "server"),
        (b'[engine]\nmax_queue = "x"\n', "engine.max_queue"),
        (b"[server]\nmax_body_bytes = 0\n", "server.max_body_bytes"),
        (b"[engine]\nmax_sequences = 0\n", "engine.max_sequences"),
        (b'[engine]\nkeep_alive = "a while"\n', "a while"),
        (b"[sampling]\ntemperature = 9\n", "sampling.temperature"),
        (b'[pricing]\nper_1k_tokens = "free"\n', "free"),
        (b'[pricing]\nper_1k_tokens = "-1"\n', "-1"),
        (b'[pricing]\nper_1k_tokens = "0.0000001"\n', "per_1k_tokens"),
        (b'[pricing]\nper_1k_tokens = "1000001"\n', "per_1k_tokens"),
        (b'[pricing.models]\n"a:1" = "NaN"\n', "a:1"),
        (b'[log]\nlevel = "loud"\n', "loud"),
        (b'[log]\nformat = "xml"\n', "xml"),
        (b'[[model]]\nname = "a b"\npath = "fake:1"\n', "a b"),
        (b'[[model]]\nname = "a:1"\npath = "/nowhere.gguf"\n', "/nowhere.gguf"),
        (b'[[model]]\nname = "a:1"\npath = "fake:1"\n' * 2, "a:1"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_a_config_that_is_wrong(tmp_path: Path, text: bytes, named: str) -> None:
    config = tmp_path / "box.toml"
    config.write_bytes(text)
    found_later = named in ("/nowhere.gguf", "a b")  # by the catalog: files may come yet
    status = 1 if found_later else INVALID
    line = refused("--config", str(config), home=tmp_path / "home", status=status)
    assert named in line
    if not named:
        assert str(config) in line


def test_a_wrong_config_in_the_home_is_refused_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text("[server]\nprot = 1\n")
    assert "prot" in refused(home=home, status=INVALID)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PINAIVU_PORT", "http"),
        ("PINAIVU_KEEP_ALIVE", "long"),
        ("PINAIVU_MAX_QUEUE", "-1"),
        ("PINAIVU_LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_environment_is_refused(tmp_path: Path, name: str, value: str) -> None:
    done = run_command("serve", home=tmp_path / "home", check=False, env={name: value})
    assert (done.returncode, done.stdout) == (INVALID, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_model_option_that_is_no_pair_is_a_wrong_call(tmp_path: Path) -> None:
    done = run_command("serve", "--model", "tiny", home=tmp_path / "home", check=False)
    assert done.returncode == 2
    assert "NAME=PATH" in done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that was used before."""
    run_command("keys", "create", home=tmp_path / "home")
    return tmp_path / "home"


def test_a_home_of_a_newer_version(home: Path) -> None:
    with sqlite3.connect(home / "pinaivu.db") as database:
        database.execute("PRAGMA user_version = 999")
    database.close()
    before = (home / "pinaivu.db").read_bytes()
    assert "newer" in refused(home=home)
    assert (home / "pinaivu.db").read_bytes() == before


def test_a_database_of_another_program(home: Path) -> None:
    with sqlite3.connect(home / "pinaivu.db") as database:
        database.execute("PRAGMA application_id = 42")
    database.close()
    assert "pinaivu.db" in refused(home=home)


def test_a_database_that_is_none(home: Path) -> None:
    for path in home.glob("pinaivu.db*"):
        path.unlink()
    (home / "pinaivu.db").write_bytes(b"This is no database. " * 100)
    assert "pinaivu.db" in refused(home=home)


def test_an_identity_that_is_damaged(home: Path) -> None:
    """It is not replaced: the receipts of the old one must stay verifiable."""
    (home / "identity.key").write_text("not hex")
    assert "identity.key" in refused(home=home)
    assert (home / "identity.key").read_text() == "not hex"


def test_a_second_server_on_the_same_home(new_box: NewBox) -> None:
    box = new_box()
    assert str(box.home) in refused(home=box.home)
    assert box.http("GET", "/v1/models").status_code == 200
    assert json.loads((box.home / "run.json").read_text())["pid"] == box.process.pid


def test_a_home_that_cannot_be_made() -> None:
    assert "/proc/box" in refused(home=Path("/proc/box"))


# -- health, models, metrics ---------------------------------------------------------------------


def test_a_fresh_box_is_alive_ready_and_lists_its_models(new_box: NewBox) -> None:
    """Without a key, and before any engine runs."""
    box = new_box(*FAKE)
    for path in ("/health", "/readyz"):
        assert box.http("GET", path, key="").status_code == 200
    listed = [model["id"] for model in box.http("GET", "/v1/models").json()["data"]]
    assert set(listed) == {MODEL, "fake:1"}
    assert box.engines() == []
    assert run_command_json("ps", home=box.home) == []


def metrics(box: Box) -> dict[tuple[str, ...], float]:
    """(name, label values…) -> value, read by Prometheus's own parser."""
    response = box.http("GET", "/metrics", key="")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_requests_and_tokens(new_box: NewBox) -> None:
    box = new_box(*FAKE)
    assert ("pinaivu_requests_total", "fake:1", "200") not in metrics(box)
    answers = [ask(box, tokens=tokens)["usage"] for tokens in (3, 5)]
    bad = {"model": "fake:1", "messages": [{"role": "user", "content": "x" * 9000}]}
    assert box.http("POST", "/v1/chat/completions", json=bad).status_code == 400
    found = metrics(box)
    assert found["pinaivu_requests_total", "fake:1", "200"] == 2
    assert found["pinaivu_requests_total", "fake:1", "400"] == 1
    assert found["pinaivu_tokens_total", "completion", "fake:1"] == 8
    prompt = sum(usage["prompt_tokens"] for usage in answers)
    assert found["pinaivu_tokens_total", "prompt", "fake:1"] == prompt
    assert found["pinaivu_time_to_first_token_seconds_count", "fake:1"] == 2
    assert found["pinaivu_engine_running", "fake:1"] == 0
    assert found["pinaivu_engine_steps_total", "fake:1"] >= 8
    assert found["pinaivu_errors_total", "context_length_exceeded"] == 1


# -- ps and ls -----------------------------------------------------------------------------------


def test_ps_shows_the_engines_of_the_running_box(new_box: NewBox) -> None:
    box = new_box("--model", "slow:1=fake:20", config=UNDRAFTED)
    with box.client.chat.completions.create(
        model="slow:1", messages=[{"role": "user", "content": "hi"}], max_tokens=4000, stream=True
    ) as running:
        next(iter(running))
        (engine,) = run_command_json("ps", home=box.home)
        assert (engine["model"], engine["state"]) == ("slow:1", "running")
        assert engine["running"] + engine["waiting"] == 1
        assert alive(engine["pid"])
        assert engine["memory"] > 1_000_000
        assert 0 <= engine["kv_used"] <= engine["kv_tokens"]
        table = run_command("ps", home=box.home).stdout
        for text in ("slow:1", str(engine["pid"]), "1 running"):
            assert text in table
    wait_until(lambda: run_command_json("ps", home=box.home)[0]["state"] == "idle", "the end of it")


def test_ps_without_a_box_is_one_sentence(home: Path) -> None:
    done = run_command("ps", home=home, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


def test_ls_lists_the_models_with_a_box_or_without(tmp_path: Path, gguf: Path) -> None:
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / "tiny.gguf").symlink_to(gguf)
    (home / "models" / "bad.gguf").write_bytes(b"no")
    listed = {model["id"]: model for model in run_command_json("ls", home=home)}
    assert set(listed) == {MODEL, "tiny:latest"}
    assert listed["tiny:latest"]["size"] == gguf.stat().st_size
    assert Path(listed["tiny:latest"]["path"]).name == "tiny.gguf"
    done = run_command("ls", home=home)
    assert "tiny:latest" in done.stdout
    assert "bad.gguf" in done.stderr
    box = Box(home).start()
    try:
        assert {model["id"] for model in run_command_json("ls", home=home)} == set(listed)
    finally:
        box.end()


# -- keep alive ----------------------------------------------------------------------------------


def pid_while_it_runs(box: Box) -> int:
    """Start a stream on slow:1, read the engine's pid, finish the stream."""
    with box.client.chat.completions.create(
        model="slow:1", messages=[{"role": "user", "content": "hi"}], max_tokens=120, stream=True
    ) as running:
        chunks = iter(running)
        next(chunks)
        (engine,) = box.engines()
        assert list(chunks)[-1].choices[0].finish_reason == "length"
    return int(engine["pid"])


def test_keep_alive_0_unloads_after_each_request(new_box: NewBox) -> None:
    box = new_box("--model", "slow:1=fake:20", env={"PINAIVU_KEEP_ALIVE": "0"}, config=UNDRAFTED)
    first = pid_while_it_runs(box)
    wait_until(lambda: box.engines() == [] and not alive(first), "the engine to be gone")
    second = pid_while_it_runs(box)
    assert second != first
    wait_until(lambda: not alive(second), "the second engine to be gone")


def test_keep_alive_keeps_it_so_long(new_box: NewBox) -> None:
    box = new_box("--model", "slow:1=fake:20", env={"PINAIVU_KEEP_ALIVE": "1s"}, config=UNDRAFTED)
    pid = pid_while_it_runs(box)
    wait_until(lambda: box.engines() == [] and not alive(pid), "the engine to be gone")


def test_a_negative_keep_alive_keeps_it(new_box: NewBox) -> None:
    """Where 0 would have unloaded it at once; the other requests take longer than that."""
    box = new_box("--model", "slow:1=fake:20", *FAKE, env={"PINAIVU_KEEP_ALIVE": "-1"})
    pid = pid_while_it_runs(box)
    for _ in range(3):
        ask(box)
    assert alive(pid)
    assert {engine["model"] for engine in box.engines()} == {"slow:1", "fake:1"}


def test_no_engine_outlives_the_box(new_box: NewBox) -> None:
    box = new_box(*FAKE)
    ask(box)
    (engine,) = box.engines()
    assert box.stop() == 0
    wait_until(lambda: not alive(engine["pid"]), "the engine to be gone")


# -- models --------------------------------------------------------------------------------------


def test_models_come_from_the_folder_the_option_and_the_config(
    tmp_path: Path, new_box: NewBox, gguf: Path
) -> None:
    """All at a time; the same file under each name, so each receipt has the same digest."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny.gguf").symlink_to(gguf)
    (folder / "owned:3b.gguf").symlink_to(gguf)
    config = tmp_path / "box.toml"
    config.write_text(f'[[model]]\nname = "configured:1"\npath = "{gguf}"\ncontext = 64\n')
    box = new_box(
        "--config", str(config), "--model", f"mine:1={gguf}", env={"PINAIVU_MODELS": str(folder)}
    )
    served = {model["id"] for model in box.http("GET", "/v1/models").json()["data"]}
    assert served == {MODEL, "tiny:latest", "owned:3b", "configured:1", "mine:1"}
    digests = set()
    for name, model in (("tiny", "tiny:latest"), ("mine:1", "mine:1"), ("configured:1",) * 2):
        answer = ask(box, name, "Say hello.")
        assert answer["model"] == model
        receipt = box.http("GET", f"/v1/receipts/{answer['request_id']}").json()
        assert receipt["model"] == model
        digests.add(json.loads(receipt["signed_receipt"])["model_digest"])
    assert len(digests) == 1
    contexts = {engine["model"]: engine["context"] for engine in box.engines()}
    assert contexts.get("configured:1") == 64


def array_of(kind: int, count: int, content: bytes = b"") -> bytes:
    """A GGUF header with one array in it."""
    return (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
        + struct.pack("<Q1sI", 1, b"a", 9)
        + struct.pack("<IQ", kind, count)
        + content
    )


BROKEN = {
    "empty": b"",
    "text": b"This is not a model.",
    "version 9": struct.pack("<4sIQQ", b"GGUF", 9, 0, 0),
    "cut off": struct.pack("<4sIQQ", b"GGUF", 3, 1, 99),
    "a long string": struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**63),
    "a long array": array_of(0, 2**63),
    "an array of long strings": array_of(8, 2, struct.pack("<QQ", 2**64 - 1, 1)),
    "arrays in arrays": array_of(9, 1, struct.pack("<IQ", 9, 1) * 5000),
    "an unknown type": array_of(99, 1),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_in_the_folder_is_named_and_not_served(
    tmp_path: Path, content: bytes
) -> None:
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / "broken.gguf").write_bytes(content)
    box = Box(home).start()
    try:
        lines = [line for line in box.errors.splitlines() if "broken.gguf" in line]
        assert len(lines) == 1
        assert "Traceback" not in box.errors
        listed = [model["id"] for model in box.http("GET", "/v1/models").json()["data"]]
        assert listed == [MODEL]
    finally:
        box.end()


def test_a_broken_file_that_was_asked_for_stops_the_start(tmp_path: Path) -> None:
    for number, content in enumerate(BROKEN.values()):
        path = tmp_path / f"broken{number}.gguf"
        path.write_bytes(content)
        assert str(path) in refused("--model", f"mine:1={path}", home=tmp_path / "home")


# -- logs ----------------------------------------------------------------------------------------


def test_the_log_has_one_line_a_request_and_nothing_private(new_box: NewBox) -> None:
    """At level debug, as JSON: who asked what when, but never a key, a prompt or an answer."""
    box = new_box(*FAKE, "--log-format", "json", "--log-level", "debug")
    prompt = "zanzibar-7431 is my password"
    unknown = generate()
    plain = ask(box, text=prompt, tokens=60)
    real = ask(box, MODEL, text=prompt, tokens=48, ignore_eos=True)
    streamed = ask(box, text=prompt, tokens=60, stream=True)
    body = {"model": "fake:1", "messages": [{"role": "user", "content": prompt}], "user": "u-9911"}
    others = [
        box.http("POST", "/v1/chat/completions", json={**body, "temperature": 9}),
        box.http("POST", "/v1/chat/completions", json={**body, "model": "no:1"}),
        box.http("POST", "/v1/chat/completions", json={**body, "max_tokens": 2, prompt: 1}),
        box.http("POST", "/v1/chat/completions", json=body, key=unknown),
        box.http("POST", "/v1/chat/completions", content=prompt.encode()),
        box.http("GET", f"/v1/admin/keys/{box.key}"),
    ]
    assert box.stop() == 0
    lines = [json.loads(line) for line in box.errors.splitlines()]
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    for answer, model in ((plain, "fake:1"), (real, MODEL)):
        (line,) = [line for line in lines if line.get("request_id") == answer["request_id"]]
        assert line["key"].startswith("key_") and line["key_name"] == "first key"
        assert line["served_by"] == "here" and line["tokens_per_s"] > 0
        assert (line["model"], line["status"]) == (model, 200)
        assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert line["completion_tokens"] == answer["usage"]["completion_tokens"]
        assert 0 <= line["queue_ms"] <= line["total_ms"]
        assert 0 <= line["ttft_ms"] <= line["total_ms"]
    streamed_id = json.loads(streamed.split("\n")[0][6:])["request_id"]
    assert len([line for line in lines if line.get("request_id") == streamed_id]) == 1
    for other in others:
        request_id = other.headers["x-request-id"]
        (line,) = [line for line in lines if line.get("request_id") == request_id]
        assert line["status"] == other.status_code
    assert [other.status_code for other in others] == [422, 404, 200, 401, 400, 404]
    said = real["choices"][0]["message"]["content"]
    assert len(said) > 12
    for secret in (box.key, unknown, box.key[13:], prompt, "zanzibar", "quick brown", said[:12]):
        assert secret not in box.errors
    # The control token in run.json looks like this; node ids are public.
    token = re.compile(r"(?<!node_)[0-9a-f]{64}")
    assert not any(token.search(json.dumps(line)) for line in lines)


def test_the_log_is_text_unless_told(new_box: NewBox) -> None:
    box = new_box(*FAKE)
    answer = ask(box)
    wait_until(lambda: answer["request_id"] in box.errors, "the line")
    (line,) = [line for line in box.errors.splitlines() if answer["request_id"] in line]
    for text in ("fake:1", "key_", "status=200", "completion_tokens=4", "total_ms="):
        assert text in line
    assert not line.startswith("{")


def test_a_request_is_one_line_of_the_log_whatever_its_path(new_box: NewBox) -> None:
    """Also of who has no key: no line and no field is made up, and no terminal told anything."""
    box = new_box(*FAKE)
    forged = "2026-01-01T00:00:00.000Z info    http status=200"
    paths = [f"/{forged}", f"/v1/a%0A{forged}%0A", "/%1b%5b2J%c2%9b2J%e2%80%ae", "/" + "a" * 9000]
    answers = [box.http("GET", path, key="") for path in paths]
    ids = [answer.headers["x-request-id"] for answer in answers]
    wait_until(lambda: ids[-1] in box.errors, "the line")
    lines = [line for line in box.errors.split("\n") if " http " in line]
    assert [name for line in lines for name in ids if name in line] == ids and len(lines) == 4
    assert not any(line.startswith("2026-01-01T00:00:00.000Z") for line in lines)
    assert not any(re.search(r'path=[^"\s]*\s+info', line) for line in lines)
    assert all(line.isprintable() and len(line) < 1000 for line in lines)


def test_a_higher_log_level_is_quieter(new_box: NewBox) -> None:
    box = new_box(*FAKE, "--log-level", "warning")
    ask(box)
    assert box.stop() == 0
    assert box.errors == ""


def test_stdout_is_the_banner_alone(new_box: NewBox) -> None:
    """So that a script may read it; the log and C libraries go elsewhere."""
    box = new_box(*FAKE, "--log-level", "debug")
    before = box.output
    ask(box)
    ask(box, MODEL, "Say hello.")
    assert box.stop() == 0
    assert box.output == before


def test_version_and_help_answer_without_a_home() -> None:
    env = environment(HOME="/nonexistent", XDG_DATA_HOME="/nonexistent")
    for args in (["--version"], ["--help"], ["serve", "--help"], ["keys", "create", "--help"]):
        done = subprocess.run(
            [*PINAIVU, *args], capture_output=True, text=True, env=env, timeout=300
        )
        assert done.returncode == 0
        assert "pinaivu" in done.stdout
    assert not Path("/nonexistent").exists()
