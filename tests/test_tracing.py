"""Spans of requests: what is in them, and that a collector in trouble troubles nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pinaivu_box.config import Config
from pinaivu_box.errors import CliError
from pinaivu_box.secret import Secret
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.tracing import context, exporter
from pinaivu_box.tracing.context import TraceContext
from pinaivu_box.tracing.exporter import Exporter
from pinaivu_box.tracing.span import Kind, Span
from pinaivu_box.tracing_config import TracingConfig, check
from pinaivu_box.tracing_headers import headers_in, read_headers
from tests.support.held_upstream import HeldUpstream
from tests.support.in_process_command import run_command
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.span_collector import Collector
from tests.support.waiting import wait_until as wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET_WORD = "xylophone"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


# -- the context -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "sampled", "joins"),
    [
        (f"00-{TRACE}-{PARENT}-01", True, True),
        (f"00-{TRACE}-{PARENT}-00", False, True),
        (f"00-{TRACE}-{PARENT}-03", True, True),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", True, True),
        (f"00-{TRACE}-{PARENT}-01-more", True, False),
        (f"ff-{TRACE}-{PARENT}-01", True, False),
        (f"00-{'0' * 32}-{PARENT}-01", True, False),
        (f"00-{TRACE}-{'0' * 16}-01", True, False),
        (f"00-{TRACE.upper()}-{PARENT}-01", True, False),
        (f"00-{TRACE}-{PARENT}-01\n", True, False),
        ("", True, False),
        ("é", True, False),
    ],
)
def test_a_client_says_which_trace_it_is_in(header: str, sampled: bool, joins: bool) -> None:
    begun = context.begin(header, 1.0)
    assert (begun is not None) == sampled
    if begun is not None:
        assert (begun.trace_id == TRACE) == joins and begun.parent_id == (PARENT if joins else "")


def test_the_share_that_is_sampled_is_that_of_the_setting() -> None:
    assert context.begin(None, 0.0) is None and context.begin(None, 1.0) is not None
    assert context.begin(f"00-{TRACE}-{PARENT}-01", 0.0) is not None
    found = sum(context.begin(None, 0.5) is not None for _ in range(2000))
    assert 800 < found < 1200
    child = TraceContext(TRACE, PARENT).child()
    assert child.parent_id == PARENT and child.header == f"00-{TRACE}-{child.span_id}-01"


# -- settings --------------------------------------------------------------------------------------


def test_headers_are_read_from_a_secret_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "headers"
    file.write_text("Authorization=Bearer%20abc,X-Tenant=lab\n")
    file.chmod(0o600)
    tracing = TracingConfig(endpoint="http://x/v1/traces", headers_file=str(file))
    secret = read_headers(tracing)
    assert secret is not None and "abc" not in repr(secret)
    assert headers_in(secret.reveal()) == {"Authorization": "Bearer abc", "X-Tenant": "lab"}
    for wrong in ("no-value", "a=b,", "a=%0d%0ax", "Bearer abc"):
        monkeypatch.setenv("HEADERS", wrong)
        with pytest.raises(CliError) as raised:
            read_headers(TracingConfig(endpoint="http://x", headers_env="HEADERS"))
        assert wrong not in raised.value.message
    for config in (
        TracingConfig(endpoint="collector:4318"),
        TracingConfig(endpoint="ftp://collector/"),
        TracingConfig(endpoint="http://user:pass@collector/"),
        TracingConfig(endpoint="http://c/", headers_env="A", headers_file="b"),
    ):
        with pytest.raises(ValueError, match="tracing"):
            check(config)


# -- the exporter ----------------------------------------------------------------------------------


def span(name: str = "chat m") -> Span:
    return Span(TraceContext(TRACE, context.new_span_id()), name, Kind.INTERNAL, 1.7e9, 1.7e9 + 1)


class Counts(dict[str, int]):
    def __call__(self, result: str, count: int) -> None:
        self[result] = self.get(result, 0) + count


def export_to(url: str) -> tuple[Exporter, Counts]:
    counts = Counts()
    return Exporter(lambda: (url, {}), {"service.name": "test"}, counts), counts


@pytest.mark.anyio
async def test_a_collector_that_is_busy_gets_the_batch_again(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(exporter, "_BATCH_SECONDS", 0.01)
    export, counts = export_to(collector.url)
    collector.status, collector.headers = 503, {"Retry-After": "0"}
    export.add(span())
    await wait_for(lambda: len(collector.requests) > 1)
    collector.status = 200
    await wait_for(lambda: counts.get("exported") == 1)
    assert len(set(collector.bodies)) == 1 and collector.resource["service.name"] == "test"
    await export.close()
    assert counts.get("dropped", 0) == 0


@pytest.mark.anyio
async def test_what_it_refuses_is_dropped_and_counted(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_BATCH_SECONDS", 0.01)
    export, counts = export_to(collector.url)
    collector.status = 400
    export.add(span())
    await wait_for(lambda: counts.get("dropped") == 1)
    assert len(collector.requests) == 1
    collector.status = 200
    collector.answer = b'{"partialSuccess": {"rejectedSpans": "1", "errorMessage": "too old"}}'
    for _ in range(3):
        export.add(span())
    await export.close()
    assert counts == {"dropped": 2, "exported": 2}


@pytest.mark.anyio
async def test_a_collector_that_says_nothing_holds_a_bounded_number(collector: Collector) -> None:
    collector.go_on.clear()
    export, counts = export_to(collector.url)
    for _ in range(exporter.MAX_QUEUED + 50):
        export.add(span())
    assert counts["dropped"] == 50
    await wait_for(lambda: collector.requests)
    collector.go_on.set()
    await export.close()
    assert counts == {"dropped": 50, "exported": exporter.MAX_QUEUED}
    assert len(collector.spans) == exporter.MAX_QUEUED


@pytest.mark.anyio
async def test_the_end_waits_only_so_long_for_a_collector_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter, "_CLOSE_SECONDS", 0.2)
    collector = Collector()
    collector.close()
    export, counts = export_to(collector.url)
    export.add(span())
    await export.close()
    assert counts.get("dropped") == 1


def test_tracing_that_a_reload_turns_off_begins_no_span() -> None:
    from prometheus_client import CollectorRegistry

    from pinaivu_box.tracing.tracer import Tracer

    live = LiveSettings(BoxSettings(Config(tracing=TracingConfig(endpoint="http://x/"))))

    async def scenario() -> None:
        tracer = Tracer(live, "node_1", CollectorRegistry())
        assert tracer.begin(None) is not None
        live.current = BoxSettings(Config(), tracing_headers=Secret("a=b"))
        assert tracer.begin(f"00-{TRACE}-{PARENT}-01") is None

    asyncio.run(scenario())


# -- a box -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upstream() -> Iterator[HeldUpstream]:
    made = HeldUpstream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def box(
    module_box: StartBox,
    upstream: HeldUpstream,
    spans: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Box:
    headers = tmp_path_factory.mktemp("secret") / "headers"
    headers.touch(0o600)
    headers.write_text("Authorization=Bearer%20letmein")
    return module_box(
        "--model",
        "fake:1=fake:1",
        config=f'[tracing]\nendpoint = "{spans.url}"\nheaders_file = "{headers}"\n'
        + upstream.config,
    )


def ask(box: Box, model: str, tokens: int = 5, **headers: str) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": SECRET_WORD}],
        "max_tokens": tokens,
        "user": SECRET_WORD,
    }
    answer = box.http("POST", "/v1/chat/completions", json=body, headers=headers)
    return dict(answer.json())


def test_a_request_is_a_span_with_what_it_spent_its_time_on(box: Box, spans: Collector) -> None:
    answer = ask(box, "fake:1", traceparent=f"00-{TRACE}-{PARENT}-01")
    (http,) = spans.named("POST /v1/chat/completions")
    assert (http.kind, http.trace, http.parent) == ("server", TRACE, PARENT) and not http.failed
    assert http.attributes["http.response.status_code"] == 200
    assert http.attributes["http.route"] == "/v1/chat/completions"
    (chat,) = spans.named("chat fake:1")
    assert chat.kind == "internal" and chat.parent == http.span
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "pinaivu",
        "gen_ai.request.model": "fake:1",
        "gen_ai.response.model": "fake:1",
        "gen_ai.response.id": answer["request_id"],
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert expected.items() <= chat.attributes.items()
    (leg,) = spans.named("leg")
    assert leg.parent == chat.span and leg.attributes["gen_ai.usage.output_tokens"] == 5
    parts = [spans.named(name)[0] for name in ("admission", "queue", "prompt", "generation")]
    assert [part.parent for part in parts] == [http.span, *[leg.span] * 3]
    times = [moment for part in parts for moment in (part.began, part.ended)]
    assert times == sorted(times) and http.began <= times[0] and times[-1] <= http.ended
    assert {each.trace for each in (http, chat, leg, *parts)} == {TRACE}
    assert spans.resource["service.name"] == "pinaivu-box"
    assert spans.resource["service.instance.id"].startswith("node_")
    assert spans.requests[0]["Authorization"] == "Bearer letmein"


def test_an_upstream_is_told_the_trace(box: Box, spans: Collector, upstream: HeldUpstream) -> None:
    ask(box, "far")
    request, leg = sorted(spans.named("chat far", 2), key=lambda each: each.kind == "client")
    assert leg.kind == "client" and leg.parent == request.span
    assert upstream.traceparents[-1] == f"00-{leg.trace}-{leg.span}-01"
    expected = {"server.address": "127.0.0.1", "server.port": upstream.port}
    assert expected.items() <= leg.attributes.items()
    assert leg.attributes["gen_ai.provider.name"] == "gpu"


def test_what_fails_has_the_code_of_its_error(
    box: Box, spans: Collector, upstream: HeldUpstream
) -> None:
    before = len([each for each in spans.spans if each.name == "chat far"])
    upstream.fails = True
    code = ask(box, "far")["error"]["code"]
    failed = spans.named("chat far", before + 2)[before:]
    assert all(each.failed for each in failed)
    assert {each.kind for each in failed} == {"client", "internal"}
    (request,) = [each for each in failed if each.kind == "internal"]
    assert request.attributes["error.type"] == code
    # What a client does wrong is no failure of the server.
    body: dict[str, Any] = {"model": "nosuch:1", "messages": []}
    assert box.http("POST", "/v1/chat/completions", json=body).status_code in (404, 422)
    wait_until(
        lambda: any(
            each.attributes.get("http.response.status_code") in (404, 422) and not each.failed
            for each in spans.spans
        ),
        "the span of a refused request",
    )


def test_no_span_has_anything_of_prompt_and_answer(box: Box, spans: Collector) -> None:
    answer = ask(box, "fake:1", tokens=30)
    text = answer["choices"][0]["message"]["content"]
    wait_until(lambda: any(answer["request_id"] in str(body) for body in spans.bodies), "its span")
    sent = b"".join(spans.bodies).decode()
    assert SECRET_WORD not in sent and text[:20] not in sent and box.key not in sent
    assert "letmein" not in sent + box.errors + box.output


def test_a_client_decides_that_it_is_not_traced(box: Box, spans: Collector) -> None:
    quiet = ask(box, "fake:1", traceparent=f"00-{'1' * 32}-{PARENT}-00")
    loud = ask(box, "fake:1", traceparent=f"00-{'2' * 32}-{PARENT}-01")
    wait_until(lambda: any(each.trace == "2" * 32 for each in spans.spans), "the sampled trace")
    assert not any(each.trace == "1" * 32 for each in spans.spans)
    assert quiet["request_id"] != loud["request_id"]
    headers = {"Accept": "application/openmetrics-text"}
    found = box.http("GET", "/metrics", headers=headers).text
    assert f'trace_id="{"2" * 32}"' in found and found.endswith("# EOF\n")


def test_a_collector_in_trouble_delays_no_request(box: Box, spans: Collector) -> None:
    spans.go_on.clear()
    try:
        for _ in range(3):
            assert ask(box, "fake:1")["usage"]
    finally:
        spans.go_on.set()


def test_the_end_of_a_box_sends_what_is_left(module_box: StartBox, collector: Collector) -> None:
    box = module_box(
        "--model", "fake:1=fake:1", config=f'[tracing]\nendpoint = "{collector.url}"\n'
    )
    ask(box, "fake:1")
    assert box.stop() == 0
    assert {"leg", "chat fake:1"} <= {each.name for each in collector.spans}


def test_without_an_endpoint_nothing_is_sent_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    config = tmp_path / "box.toml"
    config.write_text('[tracing]\nendpoint = "collector"\n')
    home = tmp_path / "home"
    done = run_command("serve", "--config", str(config), "--port", "0", home=home, check=False)
    assert done.returncode == 78 and "tracing.endpoint" in done.stderr
