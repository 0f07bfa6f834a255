"""The settings of upstreams and their keys, what they are routed for, and what they never get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import pytest

from pinaivu_box.config import Config, load
from pinaivu_box.doctor import upstreams as doctor
from pinaivu_box.engine.messages import Output, SamplingParams
from pinaivu_box.errors import CliError
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gossip.adverts import ModelLoad
from pinaivu_box.models.catalog import Model
from pinaivu_box.openai.reader import Reader, Text
from pinaivu_box.routing.router import Candidate, RoutingRequest, route
from pinaivu_box.secret import Secret, read_secret
from pinaivu_box.settings import read_upstream_keys
from pinaivu_box.upstream.answer import BadAnswer, StreamedAnswer
from pinaivu_box.upstream.upstream import Upstream
from pinaivu_box.upstream_config import UpstreamConfig
from tests.support.in_process_box import in_process_box
from tests.support.memory_transport import MemoryNetwork
from tests.support.vllm_server import MODEL, VllmServer, vllm_server


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- settings --------------------------------------------------------------------------------------

GOOD = {"name": "cluster", "url": "https://gpu.example.org/v1"}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"url": "gpu.example.org"}, "url"),
        ({"url": "ftp://gpu.example.org/v1"}, "url"),
        ({"url": "https://gpu.example.org/v1?key=1"}, "url"),
        ({"url": "https://me:secret@gpu.example.org/v1"}, "password"),
        ({"key_env": "A", "key_file": "b"}, "both"),
        ({"key": "sk-1"}, "unknown setting"),
        ({"models": []}, "no models"),
        ({"models": {}}, "no models"),
        ({"price": "cheap"}, "price"),
        ({"prices": {"a": "-1"}}, 'price of "a"'),
        ({"concurrency": 0}, "concurrency"),
        ({"stall_seconds": 0}, "stall_seconds"),
    ],
)
def test_a_setting_that_is_wrong_is_named(
    tmp_path: Path, settings: dict[str, object], why: str
) -> None:
    path = tmp_path / "box.toml"
    path.write_text("")
    with pytest.raises(CliError) as raised:
        load(path, environ={}, overrides={("upstream",): [{**GOOD, **settings}]})
    assert why in raised.value.message and "secret" not in raised.value.message.replace(
        "holds a password", ""
    )


def test_a_name_that_no_model_can_have_is_refused() -> None:
    for models in (("a b",), {"gpt 4": "gpt-4"}):
        upstream = UpstreamConfig(name="u", url="", models=models)
        with pytest.raises(CliError, match="no name of a model"):
            read_upstream_keys(Config(upstream=[upstream]))
    good = UpstreamConfig(name="u", url="", models=("meta-llama/*", "*", "a:1"))
    assert read_upstream_keys(Config(upstream=[good])) == {}


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="cluster is used twice"):
        load(None, environ={}, overrides={("upstream",): [GOOD, GOOD]})


def test_a_key_is_read_from_the_environment_or_from_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-1\n")
    file.chmod(0o400)
    found = read_secret("it", "", str(file))
    assert found is not None and found.reveal() == "sk-1"
    found = read_secret("it", "KEY", "", {"KEY": " sk-2 "})
    assert found == Secret("sk-2") and found != Secret("sk-1")
    assert "sk" not in repr(found) and "sk" not in str(found)
    assert read_secret("it", "", "") is None
    assert read_upstream_keys(Config(upstream=[UpstreamConfig(name="u", url="")])) == {}


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("sk-1", 0o644, "chmod 600"),
        ("sk-1", 0o620, "chmod 600"),
        ("", 0o600, "is empty"),
        ("x" * 20_000, 0o600, "too long"),
        ("a b", 0o600, "is no key"),
        ("a\nb", 0o600, "is no key"),
        ("schlüssel", 0o600, "is no key"),
    ],
)
def test_a_file_that_is_no_secret_is_refused_in_one_sentence(
    tmp_path: Path, content: str, mode: int, why: str
) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(CliError, match=why) as raised:
        read_secret("upstream cluster", "", str(file))
    assert not content or content not in raised.value.message


def test_a_key_that_is_not_there_is_said(tmp_path: Path) -> None:
    for variable, file in (("NO_KEY", ""), ("", str(tmp_path / "none")), ("", str(tmp_path))):
        with pytest.raises(CliError, match="upstream cluster: the "):
            read_secret("upstream cluster", variable, file, {})


# -- doctor ----------------------------------------------------------------------------------------


def test_the_doctor_asks_each_of_them(tmp_path: Path, server: VllmServer) -> None:
    server.key = "sk-1"
    file = tmp_path / "key"
    file.write_text("sk-1")
    file.chmod(0o600)
    good = UpstreamConfig(name="good", url=server.url, key_file=str(file))
    keyless = UpstreamConfig(name="keyless", url=server.url)
    gone = UpstreamConfig(name="gone", url="http://127.0.0.1:9/v1")
    lost = UpstreamConfig(name="lost", url=server.url, key_file=str(tmp_path / "none"))
    checks = list(doctor.configured(Config(upstream=[good, keyless, gone, lost])))
    assert [check.state for check in checks] == ["ok", "failed", "failed", "warning"]
    assert "1 models" in checks[0].found and "cannot be reached" in checks[2].found
    assert list(doctor.configured(Config())) == []


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_its_health_is_asked_on_its_own_host(server: VllmServer, path: str) -> None:
    base = server.url.removesuffix("/v1") + path
    upstream = Upstream(UpstreamConfig(name="u", url=base, health="health"), None, "")
    await upstream.look()
    await upstream.client.aclose()
    assert upstream.down is None and server.polls == 2


# -- routing ---------------------------------------------------------------------------------------

HERE = Candidate(
    node_id="node_home", model="m:1", digest="d1", sequences=4, load=ModelLoad(2, 9000, 0),
    ttft_ms=100.0, tokens_per_s=50.0, cost=1000, currency="credits", local=True,
)  # fmt: skip
UPSTREAM = replace(
    HERE, node_id="upstream:u", digest="other", local=False, ttft_ms=1.0, known=True, upstream="u"
)
ASK = RoutingRequest("m:1", "d1", 500, "credits")


def chosen(*candidates: Candidate, ask: RoutingRequest = ASK) -> str | None:
    return route(candidates, ask, Random(1)).node_id


def test_an_upstream_is_asked_if_this_box_could_not_begin_at_once() -> None:
    full = replace(HERE, load=ModelLoad(0, 0, 9))
    assert chosen(HERE, UPSTREAM) == HERE.node_id
    assert chosen(full, UPSTREAM) == UPSTREAM.node_id
    assert chosen(replace(HERE, refuses="has an engine that failed"), UPSTREAM) == UPSTREAM.node_id
    assert chosen(full, UPSTREAM, ask=replace(ASK, policy="never")) == HERE.node_id
    assert chosen(full, UPSTREAM, ask=replace(ASK, local_only=True)) == HERE.node_id
    assert chosen(HERE, replace(UPSTREAM, cost=1), ask=replace(ASK, policy="cheapest")) == (
        UPSTREAM.node_id
    )


# -- peers -----------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[VllmServer]:
    with vllm_server() as started:
        yield started


@pytest.mark.anyio
async def test_peers_are_never_offered_an_upstreams_models(
    tmp_path: Path, server: VllmServer
) -> None:
    upstream = {"name": "cluster", "url": server.url}
    async with in_process_box(
        MemoryNetwork(), tmp_path / "box", ("fake:1",), upstream=[upstream]
    ) as box:
        listed = (await box.http("GET", "/v1/models")).json()["data"]
        assert MODEL in [model["id"] for model in listed]
        done = await box.chat(model=MODEL)  # a box with peers serves them likewise
        assert done.json()["choices"][0]["message"]["content"] == "The sky is blue."
        assert done.headers["x-pinaivu-route"].startswith("upstream:cluster")
        offered = [model.id for model in box.box.offers.describe().models]
        assert MODEL not in offered
        assert MODEL not in [model.id for model in box.box.catalog.models]


# -- answers ---------------------------------------------------------------------------------------


def job(**more: object) -> Job:
    model = Model("m:1", Path())
    base = Job("req_1", model, [{"role": "user", "content": "Hi"}], SamplingParams(), None, [], "k")
    return replace(base, **more)  # type: ignore[arg-type]


def delta(**fields: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": fields}]}).encode()


def call(index: int, name: str | None, arguments: str) -> dict[str, object]:
    return {"index": index, "function": {"name": name, "arguments": arguments}}


def test_the_text_that_is_committed_to_is_what_a_model_would_write() -> None:
    answer = StreamedAnswer(job())
    outputs = [
        answer.take(delta(role="assistant", content="")),
        answer.take(delta(reasoning="Hm")),
        answer.take(delta(content="So: ")),
        answer.take(delta(tool_calls=[call(0, "f", '{"a": 1'), call(0, None, "}")])),
        answer.take(delta(tool_calls=[call(1, "g", "")])),
    ]
    assert outputs[0] is None
    text = "".join(output.text for output in outputs if output) + answer.last().text
    assert text == (
        '<think>Hm</think>So: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )


@pytest.mark.parametrize(
    "calls",
    [
        [call(1, "f", "")],
        [call(0, None, "{}")],
        [call(0, "f", ""), call(1, "g", ""), call(0, None, "x")],
    ],
)
def test_calls_in_no_order_are_no_answer(calls: list[object]) -> None:
    with pytest.raises(BadAnswer):
        StreamedAnswer(job()).take(delta(tool_calls=calls))


def test_calls_that_are_all_numbered_0_are_told_apart_by_their_ids() -> None:
    answer = StreamedAnswer(job())
    calls = [{**call(0, name, "{}"), "id": f"id-{name}"} for name in ("f", "g")]
    output = answer.take(delta(tool_calls=[*calls, {**call(0, None, " "), "id": "of-a-piece"}]))
    assert output is not None
    assert (output.text + answer.last().text).count("<tool_call>") == 2


def test_numbers_of_tokens_that_are_none_are_no_answer() -> None:
    for number in (-1, 1.5, "many"):
        with pytest.raises(BadAnswer):
            wrong = {"usage": {"prompt_tokens": number}}
            StreamedAnswer(job()).take(json.dumps(wrong).encode())
    answer = StreamedAnswer(job())
    details = {"cached_tokens": 99}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": details}
    answer.take(json.dumps({"choices": [], "usage": usage}).encode())
    assert (answer.counted.prompt, answer.counted.cached, answer.counted.completion) == (3, 3, 2)


def test_frames_hold_no_more_than_before() -> None:
    """An output that was parsed elsewhere is one to whoever reads frames."""
    answer = StreamedAnswer(job())
    output = answer.take(delta(content="word"))
    assert output is not None and msgspec.msgpack.encode(output) == msgspec.msgpack.encode(
        Output("word", [])
    )
    assert Reader(None).read(output) == [Text("word")]
