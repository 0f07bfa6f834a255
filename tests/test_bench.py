"""`pinaivu bench`: its statistics and parsers alone, and whole runs against the fake model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box.bench.client import RequestOutcome, stream
from pinaivu_box.bench.compare import BenchRun, figures, medians, ratios, turns
from pinaivu_box.bench.plot import svg
from pinaivu_box.bench.report import document, notes, rows
from pinaivu_box.bench.run import Measured, RunPlan, Tenant
from pinaivu_box.bench.statistics import gaps, jain, percentile, quantiles, summarise
from pinaivu_box.bench.target import BenchTarget
from pinaivu_box.bench.wire import EventParser, ResponseParser, WireError
from pinaivu_box.bench.workload import Lengths, Scale, Workload, WorkloadRequest, arrivals
from pinaivu_box.errors import UsageError
from tests.support.in_process_command import run_command
from tests.support.process_box import PINAIVU, Box, StartBox, environment

MODEL = "fake:1"  # 2 ms a step
HELLO = WorkloadRequest([{"role": "user", "content": "Hello"}], 4)


# -- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "index"),
    [([5, 5, 5], 1.0), ([1, 0, 0, 0], 0.25), ([1, 3], 0.8), ([7], 1.0), ([0, 0], None)],
)
def test_jains_index(values: list[float], index: float | None) -> None:
    assert jain(values) == (None if index is None else pytest.approx(index))


def test_percentiles_lie_between_values() -> None:
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert percentile(values, 0) == 10
    assert percentile(values, 0.5) == 30
    assert percentile(values, 0.95) == pytest.approx(48)
    assert percentile(values, 1) == 50
    assert percentile([3.0], 0.99) == 3


def test_quantiles_are_in_milliseconds() -> None:
    found = quantiles([0.003, 0.001, 0.002])
    assert found is not None
    assert (found.n, found.mean, found.p50, found.max) == (3, 2, 2, 3)
    assert quantiles([]) is None


def outcome(*arrivals_at: float, **more: Any) -> RequestOutcome:
    """Started at 0, ended with its last piece of text."""
    pieces = more.pop("deltas", [1] * len(arrivals_at))
    ended = more.pop("ended", arrivals_at[-1] if arrivals_at else 1.0)
    return RequestOutcome(arrivals=list(arrivals_at), deltas=pieces, ended=ended, **more)


def plan(**more: Any) -> RunPlan:
    lengths = Lengths("fixed", 8)
    return RunPlan(Workload(lengths, lengths), **more)


def test_a_bundle_of_tokens_is_one_arrival_with_one_gap() -> None:
    one = outcome(1.0, 1.4, deltas=[1, 4])
    assert gaps(one) == [pytest.approx(0.4)]
    found = summarise(Measured([one], None, 0.0, 2.0, 0.0), plan())
    assert found.tokens_per_arrival == 2.5
    assert found.tokens_per_s == 2.5
    assert found.per_token_ms is not None and found.per_token_ms.p50 == pytest.approx(100)


def test_tokens_are_those_of_the_usage_where_there_is_one() -> None:
    told, counted = outcome(1.0, 2.0, usage_tokens=6), outcome(1.0, 2.0)
    found = summarise(Measured([told, counted], None, 0.0, 2.0, 0.0), plan())
    assert found.completion_tokens == 8
    assert found.tokens_from == "deltas and usage"


def test_tokens_after_the_duration_do_not_count_towards_the_rates() -> None:
    one = outcome(1.0, 2.0, 3.0, 4.0, usage_tokens=8)
    found = summarise(Measured([one], None, 0.0, 2.0, 0.0), plan())
    assert found.tokens_per_s == 2
    assert found.requests_per_s == 0
    assert found.requests == 1


def test_failed_requests_count_as_errors_only() -> None:
    failed = outcome(1.0, 9.0, error="disconnected", detail="it went away")
    found = summarise(Measured([outcome(1.0, 2.0), failed], None, 0.0, 2.0, 0.0), plan())
    assert found.errors == {"disconnected": 1}
    assert found.error_example == "it went away"
    assert found.requests == 1
    assert found.gap_ms is not None and found.gap_ms.n == 1


def test_fairness_is_per_tenant() -> None:
    two = plan(tenants=(Tenant("light", 1), Tenant("heavy", 3)))
    seen = [outcome(1.0, 2.0, tenant=0), *[outcome(1.0, 2.0, tenant=1)] * 3]
    found = summarise(Measured(seen, None, 0.0, 2.0, 0.0), two)
    assert found.jain_per_client == pytest.approx(1)
    assert found.jain_per_tenant == pytest.approx(64 / (2 * 40))
    assert [one.tokens_per_client for one in found.tenants] == [2, 2]


def test_the_intruders_gaps_are_those_that_touch_its_prefill() -> None:
    stream = outcome(0.0, 1.0, 2.0, 5.0, 6.0, 7.0)
    intruder = RequestOutcome(started=2.5, arrivals=[5.5], deltas=[1], ended=5.5, prompt_tokens=900)
    found = summarise(Measured([stream], intruder, 0.0, 7.0, 0.0), plan()).intruder
    assert found is not None
    assert found.ttft_ms == 3000
    assert found.gap_ms is not None
    assert (found.gap_ms.n, found.gap_ms.max) == (2, 3000)


def made_run(target: int, pair: int, speed: float) -> BenchRun:
    """A run with so many tokens a second."""
    times = [(i + 1) / speed for i in range(20)]
    one = summarise(Measured([outcome(*times)], None, 0.0, times[-1], 0.1), plan())
    return BenchRun(target, pair, one, [times[0]], [1 / speed] * 19)


def test_pairs_take_turns_and_their_ratios_are_medians() -> None:
    assert list(turns(2, 3)) == [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]
    assert list(turns(1, 1)) == [(0, 0)]
    runs = [made_run(t, p, v) for p, (a, b) in enumerate([(20, 10), (30, 10), (10, 10)])
            for t, v in ((0, a), (1, b))]  # fmt: skip
    found = ratios(runs)["tokens_per_s"]
    assert (found.median, found.min, found.max) == pytest.approx((2, 1, 3))
    assert ratios(runs)["gap_ms.p50"].median == pytest.approx(0.5)
    assert medians(runs, 0)["tokens_per_s"] == pytest.approx(20)
    assert set(ratios(runs)) <= set(figures(runs[0].summary))


# -- workloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean"),
    [("128", 128), ("uniform:64-256", 160), ("lognormal:128,0.6", 128 * math.exp(0.18))],
)
def test_lengths_have_their_mean_and_depend_on_the_seed(text: str, mean: float) -> None:
    lengths = Lengths.parse(text)
    draws = [lengths.draw(rng) for rng in [random.Random(1)] for _ in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(mean, rel=0.03)
    assert min(draws) >= 1
    again = [lengths.draw(rng) for rng in [random.Random(1)] for _ in range(20_000)]
    assert draws == again


@pytest.mark.parametrize(
    "text",
    ["", "0", "-4", "x", "1,2", "uniform:5", "uniform:9-3", "normal:3,1", "lognormal:9", "nan"],
)
def test_an_invalid_length_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--prompt-tokens cannot be"):
        Lengths.parse(text, "--prompt-tokens")


def test_arrivals_are_poisson() -> None:
    times = [at for at, _ in zip(arrivals(50.0, "a"), range(20_000), strict=False)]
    waits = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(waits) / len(waits)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    variance = sum((wait - mean) ** 2 for wait in waits) / len(waits)
    assert variance == pytest.approx(mean**2, rel=0.1)
    assert times[:9] == [at for at, _ in zip(arrivals(50.0, "a"), range(9), strict=False)]
    assert times[:9] != [at for at, _ in zip(arrivals(50.0, "b"), range(9), strict=False)]


def test_requests_depend_on_seed_and_number_only() -> None:
    lengths = Lengths.parse("uniform:20-40")
    one, other = Workload(lengths, lengths, "1"), Workload(lengths, lengths, "2")
    assert [one.request(n) for n in (3, 1, 2)] == [one.request(n) for n in (3, 1, 2)]
    assert one.request(1) != one.request(2)
    assert one.request(1) != other.request(1)


def test_prompts_have_the_length_that_the_scale_says() -> None:
    workload = Workload(
        Lengths("fixed", 100), Lengths("fixed", 8), shared_prefix=210, scale=Scale(2.0, 10.0)
    )
    system, user = workload.request(0).messages
    assert (system["role"], len(system["content"].split())) == ("system", 100)
    assert (user["role"], len(user["content"].split())) == ("user", 50)
    assert workload.request(1).messages[0] == system
    assert workload.request(1).messages[1] != user
    (intruder,) = workload.intruder(1010).messages
    assert len(intruder["content"].split()) == 500


def test_repetitive_prompts_show_how_a_text_is_repeated_and_ask_for_another() -> None:
    workload = Workload(Lengths("fixed", 300), Lengths("fixed", 8), repetitive=True)
    asked, answered, again = workload.request(0).messages
    order, example = asked["content"].split("\n\n")
    assert answered == {"role": "assistant", "content": example}
    other_order, text = again["content"].split("\n\n")
    assert order == other_order
    assert text != example
    assert 2 * len(example.split()) + len(text.split()) == 300


# -- the wire ------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(parts: list[bytes]) -> bytes:
    body = b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in parts if part)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\nTrailer: x\r\n\r\n"


def counted(parts: list[bytes]) -> bytes:
    body = b"".join(parts)
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def to_the_end(parts: list[bytes]) -> bytes:
    return b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"\r\n" + b"".join(parts)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The data, cut at these places."""
    for start, end in pairwise([0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]):
        yield data[start:end]


@given(
    parts=st.lists(st.binary(max_size=40), max_size=8),
    form=st.sampled_from([chunked, counted, to_the_end]),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_the_body_is_the_same_however_the_bytes_arrive(
    parts: list[bytes], form: Any, cuts: list[int]
) -> None:
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces(form(parts), cuts) if piece)
    assert body == b"".join(parts)
    assert parser.status == 200
    assert parser.headers["content-type"] == "text/event-stream"
    assert parser.done or form is to_the_end
    assert parser.end()


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_bytes_that_are_no_answer_raise_nothing_else(data: bytes, cuts: list[int]) -> None:
    for start in (b"", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"):
        parser, body = ResponseParser(), b""
        with contextlib.suppress(WireError):
            for piece in pieces(start + data, cuts):
                body += parser.feed(piece)
        assert len(body) <= len(data)  # and nothing is made up


@pytest.mark.parametrize("whole", [chunked([b"abc", b"def"]), counted([b"abcdef"])])
def test_an_answer_that_breaks_off_is_not_complete(whole: bytes) -> None:
    parser = ResponseParser()
    parser.feed(whole[:-1])
    assert not parser.end()


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n"), min_size=1), max_size=6),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_events_are_the_same_however_the_bytes_arrive(
    texts: list[str], line_end: bytes, cuts: list[int]
) -> None:
    payloads = [json.dumps(text).encode() for text in texts]
    lines = [b": a comment", b""]
    for payload in payloads:
        lines += [b"event: x", b"data: " + payload, b""]
    parser = EventParser()
    data = line_end.join(lines) + line_end
    found = [event for piece in pieces(data, cuts) for event in parser.feed(piece)]
    assert found == payloads


def test_the_lines_of_an_event_are_joined() -> None:
    assert EventParser().feed(b"data: a\ndata:b\n\n\n") == [b"a\nb"]


# -- one request ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that says this to everybody and closes; its URL."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def asked(answer: bytes) -> RequestOutcome:
    async def run() -> RequestOutcome:
        found = RequestOutcome()
        async with answering(answer) as url:
            target = BenchTarget.parse(url, model="m")
            await stream(target, target.message(HELLO), found, 30)
        return found

    return asyncio.run(run())


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def text(content: str | None) -> bytes:
    return event({"choices": [{"delta": {"content": content}, "finish_reason": None}]})


END = event({"choices": [{"delta": {}, "finish_reason": "length"}]})
DETAILS = {"prompt_tokens_details": {"cached_tokens": 5}}
USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, **DETAILS}})
DONE = b"data: [DONE]\n\n"


def test_a_stream_is_counted_and_timed() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None})
    found = asked(chunked([role, text(None), text("a"), text("bc"), END, USAGE, DONE]))
    assert found.error == ""
    assert (found.prompt_tokens, found.cached_tokens, found.tokens) == (9, 5, 3)
    assert found.finish_reason == "length"
    assert sum(found.deltas) == 2
    assert found.started <= found.arrivals[0] <= found.arrivals[-1] <= found.ended


def test_reasoning_is_text_too() -> None:
    thought = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    assert asked(to_the_end([thought, END, DONE])).deltas == [1]


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        (
            b'HTTP/1.1 429 Slow\r\ncontent-length: 34\r\n\r\n{"error": {"message": "too fast"}}',
            "http 429",
            "429: too fast",
        ),
        (b"HTTP/1.1 500 Oh\r\n\r\nplain words", "http 500", "500: plain words"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
            "no event stream",
            "the server did not stream its answer",
        ),
        (chunked([text("a"), END, DONE])[:-90], "disconnected", "before the end"),
        (b"", "disconnected", "before the end"),
        (chunked([text("a")]), "unfinished stream", ""),
        (chunked([text("a"), event({"error": {"message": "gone"}})]), "error event", "gone"),
        (chunked([b"data: {nonsense\n\n"]), "malformed answer", "malformed"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "malformed answer", "no HTTP/1.1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_failures_are_told_apart(answer: bytes, error: str, detail: str) -> None:
    found = asked(answer)
    assert found.error == error
    assert detail in found.detail
    assert found.ended >= found.started


def test_a_stream_that_ends_without_closing_bytes_is_complete_after_done() -> None:
    assert asked(chunked([text("a"), END, DONE])[:-18]).error == ""


def test_an_address_without_a_server_is_an_error(closed_port: int) -> None:
    async def run() -> RequestOutcome:
        found = RequestOutcome()
        target = BenchTarget.parse(f"http://127.0.0.1:{closed_port}", model="m")
        await stream(target, target.message(HELLO), found, 30)
        return found

    assert asyncio.run(run()).error == "cannot connect"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Nobody listens there, nor can anybody begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("http://localhost:4001", ("localhost", 4001, "/v1/chat/completions")),
        ("http://localhost:4001/v1/", ("localhost", 4001, "/v1/chat/completions")),
        ("http://[::1]:1/x/chat/completions", ("::1", 1, "/x/chat/completions")),
        ("http://example.org/api/v1", ("example.org", 80, "/api/v1/chat/completions")),
        ("https://example.org", ("example.org", 443, "/v1/chat/completions")),
    ],
)
def test_a_url_has_a_host_a_port_and_a_path(url: str, where: tuple[str, int, str]) -> None:
    target = BenchTarget.parse(url)
    assert (target.host, target.port, target.path) == where
    assert (target.tls is not None) == url.startswith("https")


@pytest.mark.parametrize("url", ["localhost:4001", "ftp://a", "http://", "http://a:x", "x"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not a URL"):
        BenchTarget.parse(url)


# -- reports -------------------------------------------------------------------------------------

TARGETS = [
    BenchTarget.parse("http://one:1", key="sk-secret", model="<m>"),
    BenchTarget.parse("http://b:2"),
]
RUNS = [made_run(target, pair, 10.0 + pair) for pair in range(2) for target in range(2)]


def test_the_document_holds_no_keys() -> None:
    made = json.dumps(document(TARGETS, plan(tenants=(Tenant("a", 1, "sk-other"),)), RUNS, "now"))
    assert "sk-" not in made


def test_rows_have_a_column_for_each_server_and_one_for_the_ratio() -> None:
    two, one = rows(TARGETS, RUNS), rows(TARGETS[:1], RUNS[::2])
    assert {len(row) for row in two} == {4}
    assert {len(row) for row in one} == {2}
    assert ["tokens/s", "10.50", "10.50", "1.00 (1.00 to 1.00)"] in two


def test_a_busy_client_is_noted() -> None:
    busy = Measured([outcome(1.0)], None, 0.0, 1.0, 0.95)
    run = BenchRun(0, 0, summarise(busy, plan()), [1.0], [])
    assert any("may be the bottleneck" in note for note in notes(TARGETS[:1], [run]))


@pytest.mark.parametrize("values", [[], [0.0], [1e-7, 3000.0], [0.004] * 9])
def test_the_plot_is_well_formed_for_any_values(values: list[float]) -> None:
    summary = RUNS[0].summary
    drawn = ET.fromstring(svg(TARGETS[:1], [BenchRun(0, 0, summary, values, values)]))
    words = [element.text or "" for element in drawn.iter() if element.tag.endswith("text")]
    assert "http://one:1 · <m>" in words
    assert words.count("milliseconds") == (2 if values else 0)
    for path in (element.get("d", "") for element in drawn.iter() if element.tag.endswith("path")):
        assert "nan" not in path and "inf" not in path


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_box(module_box: StartBox) -> Box:
    return module_box("--model", f"{MODEL}=fake:2")


def bench(*args: str, key: str) -> subprocess.CompletedProcess[str]:
    return run_command("bench", "--key", key, *args, home=None, check=False)


def bench_json(box: Box, *args: str) -> Any:
    common = ["--model", MODEL, "--prompt-tokens", "60", "--json"]
    done = bench(f"{box.url}/v1", *common, *args, key=box.key)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_closed_loop(fake_box: Box) -> None:
    made = bench_json(fake_box, "--clients", "3", "--requests", "7", "--output-tokens", "12")
    (run,) = made["runs"]
    assert run["requests"] == 7
    assert run["errors"] == {}
    assert run["completion_tokens"] == 7 * 12
    assert run["tokens_from"] == "usage"
    assert run["ttft_ms"]["n"] == run["latency_ms"]["n"] == 7
    assert run["tokens_per_s"] > 0
    # One byte is one token here: the scale was found, so prompts are about as long as asked.
    assert 45 <= run["prompt_tokens"] / 7 <= 75
    assert made["ratios"] == {}
    assert made["targets"] == [{"url": f"{fake_box.url}/v1", "model": MODEL, "fields": {}}]


def test_an_open_loop_for_some_seconds(fake_box: Box) -> None:
    args = ("--rate", "20", "--seconds", "1", "--output-tokens", "uniform:4-8", "--seed", "x")
    (run,) = bench_json(fake_box, *args)["runs"]
    due = [at for at, _ in zip(arrivals(20.0, "x/0"), range(99), strict=False) if at < 1]
    assert run["requests"] == len(due)
    assert run["seconds"] == 1


def test_two_urls_in_pairs_with_a_plot(fake_box: Box, tmp_path: Path) -> None:
    url, plot = f"{fake_box.url}/v1", tmp_path / "out.svg"
    args = ["--model", MODEL, "--model2", MODEL, "--pairs", "2", "--requests", "2"]
    args += ["--output-tokens", "8", "--plot", str(plot), "--temperature", "0", "--json"]
    done = bench(url, url, *args, "--body2", '{"top_p": 0.5}', key=fake_box.key)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [(run["pair"], run["target"]) for run in made["runs"]] == [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 0),
    ]
    assert [one["fields"] for one in made["targets"]] == [
        {"temperature": 0.0},
        {"temperature": 0.0, "top_p": 0.5},
    ]
    first, second, *_ = made["runs"]
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert len(made["ratios"]["tokens_per_s"]["pairs"]) == 2
    assert ET.parse(plot).getroot().tag.endswith("svg")


def test_an_intruder(fake_box: Box) -> None:
    args = ("--clients", "2", "--requests", "2", "--output-tokens", "60", "--intruder", "900")
    (run,) = bench_json(fake_box, *args)["runs"]
    assert 800 <= run["intruder"]["prompt_tokens"] <= 1000
    assert run["intruder"]["error"] == ""
    assert run["intruder"]["ttft_ms"] > 0
    assert run["requests"] >= 2


def test_tenants_with_keys_of_their_own(fake_box: Box) -> None:
    tenants = f"light:1,heavy:3:{fake_box.key},broken:1:sk-wrong"
    args = ("--tenants", tenants, "--requests", "12", "--output-tokens", "8", "--warmup", "0")
    (run,) = bench_json(fake_box, *args)["runs"]
    light, heavy, broken = run["tenants"]
    assert light["requests"] + heavy["requests"] + broken["errors"] == 12
    assert heavy["requests"] >= light["requests"] > 0
    assert broken["requests"] == 0
    assert set(run["errors"]) == {"http 401"}
    assert 0 < run["jain_per_client"] <= 1


def test_a_shared_prefix_of_repetitive_text_as_a_table(fake_box: Box) -> None:
    args = ["--requests", "2", "--shared-prefix", "300", "--repetitive", "--output-tokens", "4"]
    done = bench(f"{fake_box.url}/v1", "--model", MODEL, *args, key=fake_box.key)
    assert done.returncode == 0, done.stderr
    for label in ("tokens/s", "first token, p95", "gap between tokens, p99", "whole request, p50"):
        assert label in done.stdout


def test_the_model_is_the_first_and_the_key_is_in_the_environment(fake_box: Box) -> None:
    first = fake_box.http("GET", "/v1/models").json()["data"][0]["id"]
    done = subprocess.run(
        [*PINAIVU, "bench", fake_box.url, "--requests", "1", "--output-tokens", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(PINAIVU_API_KEY=fake_box.key),
    )
    assert json.loads(done.stdout)["targets"][0]["model"] == first


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["http://127.0.0.1:{port}", "--model", "m"], 1, "cannot be reached"),
        (["http://127.0.0.1:{port}"], 1, "cannot be reached"),
        (["{url}", "--model", "nobody:1"], 1, "does not answer a chat request: 404"),
        (["{url}", "--key", "sk-wrong"], 1, "answered 401"),
        (["{url}", "--model", MODEL, "--body", '{{"temprature": 1}}'], 1, "mean 'temperature'"),
        (["{url}", "--body", "[]"], 2, "--body is not a JSON object"),
        (["{url}", "{url}", "{url}"], 2, "one URL, or two"),
        (["{url}", "--pairs", "3"], 2, "--pairs needs two URLs"),
        (["{url}", "--rate", "3", "--intruder", "9"], 2, "--rate (open loop)"),
        (["{url}", "--clients", "3", "--tenants", "a:1"], 2, "remove --clients"),
        (["{url}", "--tenants", "a:1,a:2"], 2, "has a name twice"),
        (["{url}", "--tenants", "a:0"], 2, "is not NAME:CLIENTS[:KEY]"),
        (["elsewhere"], 2, "is not a URL"),
        (["{url}", "--model", MODEL, "--requests", "1", "--plot", "/no/where"], 1, "be written"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    fake_box: Box, closed_port: int, args: list[str], status: int, message: str
) -> None:
    filled = [arg.format(url=fake_box.url, port=closed_port) for arg in args]
    done = bench(*filled, key=fake_box.key)
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
