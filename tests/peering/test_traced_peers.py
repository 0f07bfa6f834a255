"""A request that a peer serves is one trace over both boxes, each with a collector of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support.peer_box import MakePeerBox, PeerBox
from tests.support.process_box import wait_until
from tests.support.span_collector import Collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FAR = "far:1"
TRACING = '[tracing]\nendpoint = "{}"\npeers = {}\n'


class Traced(NamedTuple):
    """anna asks, and ben serves; what each has sent to its collector."""

    anna: PeerBox
    ben: PeerBox
    asked: Collector
    served: Collector

    def join(self) -> None:
        self.anna.start()
        self.ben.start()
        self.ben.peers("join", self.anna.invite("--name", "ben"))
        wait_until(lambda: FAR in self.anna.http("GET", "/v1/models").text, "ben's model")

    def ask(self, traceparent: str) -> None:
        words = [{"role": "user", "content": "xylophone"}]
        body = {"model": FAR, "messages": words, "max_tokens": 5}
        headers = {"traceparent": traceparent}
        answer = self.anna.http("POST", "/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.fixture
def collectors() -> Iterator[tuple[Collector, Collector]]:
    made = Collector(), Collector()
    yield made
    for one in made:
        one.close()


def traced(member: MakePeerBox, collectors: tuple[Collector, Collector], peers: bool) -> Traced:
    asked, served = collectors
    told = str(peers).lower()
    anna = member("anna", TRACING.format(asked.url, told))
    ben = member("ben", TRACING.format(served.url, "false"), "--model", f"{FAR}=fake:1")
    return Traced(anna, ben, asked, served)


def test_the_spans_of_both_boxes_are_one_trace(
    member: MakePeerBox, collectors: tuple[Collector, Collector]
) -> None:
    boxes = traced(member, collectors, peers=True)
    boxes.join()
    boxes.ask(f"00-{TRACE}-{PARENT}-01")
    (http,) = boxes.asked.named("POST /v1/chat/completions")
    request, leg = sorted(boxes.asked.named(f"chat {FAR}", 2), key=lambda one: one.kind == "client")
    (served,) = boxes.served.named(f"chat {FAR}")
    assert (http.parent, request.parent, leg.parent) == (PARENT, http.span, request.span)
    assert (served.kind, served.parent, served.failed) == ("server", leg.span, False)
    parts = [boxes.served.named(name)[0] for name in ("queue", "prompt", "generation")]
    assert {part.parent for part in parts} == {served.span}
    assert {one.trace for one in (http, request, leg, served, *parts)} == {TRACE}
    assert served.attributes["gen_ai.usage.output_tokens"] == 5
    ids = [one.resource["service.instance.id"] for one in (boxes.asked, boxes.served)]
    assert ids == [leg_of["own"]["id"] for leg_of in map(_peers, (boxes.anna, boxes.ben))]
    assert leg.attributes["pinaivu.node_id"] == served.attributes["pinaivu.node_id"] == ids[1]
    assert b"xylophone" not in b"".join([*boxes.asked.bodies, *boxes.served.bodies])
    # A client that is not traced decides so for both boxes.
    boxes.ask(f"00-{'1' * 32}-{PARENT}-00")
    boxes.ask(f"00-{'2' * 32}-{PARENT}-01")
    wait_until(lambda: any(one.trace == "2" * 32 for one in boxes.served.spans), "the last trace")
    assert not any(one.trace == "1" * 32 for one in (*boxes.asked.spans, *boxes.served.spans))


def test_peers_are_told_no_trace_unless_the_operator_wants_it(
    member: MakePeerBox, collectors: tuple[Collector, Collector]
) -> None:
    boxes = traced(member, collectors, peers=False)
    boxes.join()
    boxes.ask(f"00-{TRACE}-{PARENT}-01")
    boxes.asked.named(f"chat {FAR}", 2)
    assert boxes.ben.stop() == 0  # it sends what it has at its end
    assert boxes.served.spans == []


def _peers(box: PeerBox) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = box.admin("GET").json()
    return found
