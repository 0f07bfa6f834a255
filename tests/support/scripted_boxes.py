"""Boxes that serve legs as a script says, and requests that run on them: no processes, no links.

The text of an answer is known beforehand: its token at position n is the nth letter of `TEXT`.
What the code under test looks like is known in the section at the end alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from ulid import ULID

from pinaivu_box.amount import Prices
from pinaivu_box.config import Config, PricingConfig, SamplingConfig
from pinaivu_box.engine.messages import Output, Prompt, SamplingDefaults, SamplingParams
from pinaivu_box.errors import ApiError, EngineLost, NoNodesAvailable
from pinaivu_box.gateway.admission import AdmittedRequest
from pinaivu_box.gateway.backend import Event, Job, Proved, Started
from pinaivu_box.gateway.local import resolve
from pinaivu_box.gateway.metering import prove
from pinaivu_box.gateway.quota import Limits, Quota, Reservation
from pinaivu_box.gateway.records import LegRecord, RequestRecord
from pinaivu_box.gateway.request import Failed, Finished, Request, RequestEvent
from pinaivu_box.legs.boxes import Boxes
from pinaivu_box.legs.runner import LegRunner
from pinaivu_box.models.catalog import Model, remote
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.receipts.commitment import Opening
from pinaivu_box.receipts.receipt import EngineBuild, Price, sign_proof
from pinaivu_box.routing.candidates import Candidates
from pinaivu_box.routing.circuit_breaker import CircuitBreaker
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.reputation import Reputation
from pinaivu_box.routing.router import Destination
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.upstream.upstreams import Upstreams
from tests.support.keys import known_identity
from tests.support.records import offer
from tests.support.waiting import DEADLINE

MODEL = "scripted:1"
DIGEST = "d" * 64
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
PROMPT = [7, 8, 9]
OWN = known_identity(50)  # the identity of the box that takes the requests


class ScriptedLeg:
    """One leg at a box: what it was asked, and what has become of it.  `output` are the tokens that
    earlier legs have made, `pays_prompt` what a peer was told (None: it is no peer)."""

    def __init__(self, box: ScriptedBox, job: Job, pays_prompt: bool | None) -> None:
        self.box, self.job, self.pays_prompt = box, job, pays_prompt
        self.output = list(job.output)
        self.cancelled, self.ended = asyncio.Event(), asyncio.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    async def run(self, take: Callable[[Event], None]) -> None:
        record = None
        try:
            async for event in self.box.script_of(self)(self):
                if self.box.peer:
                    record = self._record(record, event)
                    if isinstance(event, Output) and event.finish_reason and record is not None:
                        take(self._proved(record))
                take(event)
        finally:
            self.ended.set()

    def _record(self, record: LegRecord | None, event: Event) -> LegRecord | None:
        return recorded(self.job, record, event)

    def _proved(self, record: LegRecord) -> Proved:
        proof, _ = prove(record, Price("credits", "0", "0", "0"))
        return Proved(proof, sign_proof(self.box.identity, proof), Opening("0" * 64, ""), b"")


Script = Callable[[ScriptedLeg], AsyncIterator[Event]]


class ScriptedBox:
    """Each leg that begins takes the next script; the last one is for all that follow."""

    def __init__(self, number: int, *scripts: Script, peer: bool = True) -> None:
        self.identity = known_identity(60 + number) if peer else OWN
        self.name, self.peer = f"peer-{number}" if peer else "own", peer
        self.legs: list[ScriptedLeg] = []
        self.offers = True  # whether it is to be found, if it is a peer
        self._scripts = list(scripts) or [answer()]

    @property
    def node_id(self) -> str:
        return self.identity.node_id

    def begin(self, job: Job, pays_prompt: bool | None = None) -> ScriptedLeg:
        leg = ScriptedLeg(self, job, pays_prompt)
        self.legs.append(leg)
        return leg

    def script_of(self, leg: ScriptedLeg) -> Script:
        number = self.legs.index(leg)
        return self._scripts[min(number, len(self._scripts) - 1)]

    async def asked(self, legs: int = 1) -> ScriptedLeg:
        """The latest leg, once there are so many."""
        async with asyncio.timeout(DEADLINE):
            while len(self.legs) < legs:  # noqa: ASYNC110, it is looked at from outside
                await asyncio.sleep(0.005)
        return self.legs[-1]


# -- scripts ---------------------------------------------------------------------------------------


def answer(
    *,
    until: int | None = None,
    error: Callable[[ScriptedLeg], Exception] | None = None,
    hold: asyncio.Event | None = None,
    before: asyncio.Event | None = None,
    deaf: bool = False,
) -> Script:
    """Makes the whole answer, or the tokens before position `until`: there it raises `error`, or
    waits for `hold` and goes on.  It begins once `before` is set, with Started.  A cancellation
    ends it, unless it is `deaf`."""

    async def script(leg: ScriptedLeg) -> AsyncIterator[Event]:
        if before is not None:
            await before.wait()
        yield started(leg)
        yield Prompt(leg.job.prompt_tokens or PROMPT)
        first, end = len(leg.output), leg.job.max_tokens or len(TEXT)
        for at in range(first, end):
            if at == until:
                if error is not None:
                    raise error(leg)
                if hold is not None:
                    await _either(hold, leg.cancelled)
            if leg.cancelled.is_set() and not deaf:
                yield Output("", [], "cancelled", 0.0 if at == first and hold else None)
                return
            await asyncio.sleep(0)
            yield token(at, first=at == first, last=at == end - 1)

    return script


def refuse(error: Callable[[], ApiError]) -> Script:
    """Says nothing but that."""

    async def script(leg: ScriptedLeg) -> AsyncIterator[Event]:
        await asyncio.sleep(0)
        raise error()
        yield

    return script


def silent() -> Script:
    """Begins, and says no token until it is cancelled."""

    async def script(leg: ScriptedLeg) -> AsyncIterator[Event]:
        yield started(leg)
        yield Prompt(leg.job.prompt_tokens or PROMPT)
        await leg.cancelled.wait()
        yield Output("", [], "cancelled", 0.0)

    return script


def started(leg: ScriptedLeg) -> Started:
    sampling = leg.job.drawn_with or resolve(leg.job, SamplingConfig(), SamplingDefaults())
    return Started(
        leg.box.node_id, DIGEST, EngineBuild("scripted", "none"), sampling, "tags", False
    )


def token(at: int, *, first: bool = False, last: bool = False) -> Output:
    letter = TEXT[at]
    return Output(letter, [ord(letter)], "length" if last else None, 0.0 if first else None)


def lost(leg: ScriptedLeg) -> EngineLost:
    """As its backend says it when an engine, or a peer, is gone."""
    return EngineLost("It is gone.", node_id=leg.box.node_id if leg.box.peer else "")


def busy() -> NoNodesAvailable:
    return NoNodesAvailable("It has no room for it.")


async def _either(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


# -- requests --------------------------------------------------------------------------------------


class Listener:
    """A request and who listens to it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.heard: list[RequestEvent] = []
        self.running = asyncio.create_task(request.run())

    async def hear(self, tokens: int) -> None:
        """Until so many tokens have come."""
        async with asyncio.timeout(DEADLINE):
            while len(self.tokens) < tokens:
                self.heard += await self.request.events.take()

    async def end(self) -> RequestEvent:
        """The last event."""
        async with asyncio.timeout(DEADLINE):
            while not self.heard or not isinstance(self.heard[-1], Finished | Failed):
                self.heard += await self.request.events.take()
            assert await self.running == self.heard[-1]
        return self.heard[-1]

    def outputs(self, choice: int = 0) -> list[Output]:
        return [output for number, output in outputs_of(self.heard) if number == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(output.text for output in self.outputs(choice))

    @property
    def tokens(self) -> list[int]:
        return [token for _, output in outputs_of(self.heard) for token in output.tokens]

    @property
    def error(self) -> ApiError:
        last = self.heard[-1]
        assert isinstance(last, Failed), last
        return last.error


class Ledger:
    """In place of a meter: what was recorded, and how it ended."""

    node_id = ""

    def __init__(self) -> None:
        self.recorded: list[tuple[RequestRecord, str]] = []

    async def record(self, account: RequestRecord, finish_reason: str, _: object) -> None:
        await asyncio.sleep(0)
        self.recorded.append((account, finish_reason))


def job(**more: Any) -> Job:
    model = Model(MODEL, Path("fake:0"), recorded_digest=DIGEST)
    base = Job(
        request_id=f"req_{ULID()}".lower(),
        model=model,
        messages=[{"role": "user", "content": "Go."}],
        sampling=SamplingParams(temperature=0.7, seed=11),
        max_tokens=12,
        stop=[],
        tenant="key_1",
    )
    return dataclasses.replace(base, **more)


class WatchedQuota(Quota):
    """Tells `settled` the tokens and the cost of each request that has ended."""

    def __init__(self, settled: Callable[[int, int], None]) -> None:
        super().__init__()
        self._settled = settled

    def end(self, reservation: Reservation, cost: int) -> None:
        super().end(reservation, cost)
        self._settled(reservation.tokens.amount, cost)


def admitted(
    *jobs: Job, key: Any = None, end: Callable[[int, int], None] | None = None, turn: bool = True
) -> AdmittedRequest:
    """A request that has its place already, or (`turn` False) waits for one that nobody leaves."""
    limits = Limits("The key", max_parallel=1, max_queue=1)
    quota = WatchedQuota(end or (lambda tokens, cost: None))
    if not turn:
        quota.reserve(limits)
    key = key or SimpleNamespace(id="key_1", name="", policy=SimpleNamespace(max_parallel=None))
    return AdmittedRequest(list(jobs), key, Prices("0", "0"), quota.reserve(limits))


# -- what the code under test looks like -----------------------------------------------------------


def recorded(of: Job, record: LegRecord | None, event: Event) -> LegRecord | None:
    """The record of a leg with one more event."""
    if isinstance(event, Started):
        return LegRecord(of, event)
    if record is not None:
        record.take(event)
    return record


def outputs_of(events: Iterable[RequestEvent]) -> list[tuple[int, Output]]:
    """With the number of their choice."""
    return [(one.choice, one) for one in events if isinstance(one, Output)]


class Network:
    """`own` is the box that takes the requests (None: it has not the model), `peers` are others.
    `changed` is to be called when one of them has changed."""

    def __init__(
        self, own: ScriptedBox | None, *peers: ScriptedBox, hedge: float = 0.0, **routing: Any
    ) -> None:
        self.own, self.peers = own, peers
        self.ledger = Ledger()
        placement: Any = SimpleNamespace(
            failing=lambda model: None,
            digest_of=_digest,
            replicas=lambda model_id: [],
            engines=(),
            places=lambda model_id: Config().engine.max_sequences,
        )
        pricing = PricingConfig(per_1k_tokens=Prices("0.001", "0.002"))
        peering = PeeringConfig(
            **{"policy": "cheapest", "hedge_ms": round(hedge * 1000), **routing}
        )
        settings = LiveSettings(BoxSettings(Config(pricing=pricing, peering=peering)))
        self.load = LoadTracker(placement)
        self.reputation = Reputation(lambda: 0.0)
        self.breaker = CircuitBreaker(asyncio.get_running_loop().time, Random(1))
        self.candidates = Candidates(
            OWN.node_id, settings, self.load, placement, self._peers, _ask_loads, self.breaker,
            self.reputation, _no_debts, Upstreams(settings, OWN.node_id),
        )  # fmt: skip
        local: Any = OwnBackend(own or ScriptedBox(0, peer=False))
        peers_: Any = _Peers(self)
        boxes = Boxes(self.candidates, local, peers_, self.load, self.breaker, self.reputation)
        self.runner = LegRunner(OWN.node_id, local, boxes)

    def changed(self) -> None:
        self.candidates.changes.notify()

    def job(self, **more: Any) -> Job:
        made = job(**more)
        return made if self.own else dataclasses.replace(made, model=remote(MODEL, DIGEST))

    def request(self, *jobs: Job, meter: Any = None, **more: Any) -> Request:
        taken = admitted(*(jobs or [self.job()]), **more)
        return Request(taken, self.runner, meter or cast("Any", self.ledger))

    def ask(self, *jobs: Job, **more: Any) -> Listener:
        return Listener(self.request(*jobs, **more))

    def _peers(self) -> list[Any]:
        return [_seen(box) for box in self.peers if box.offers]


def _seen(box: ScriptedBox) -> Any:
    """As `peering.peer.Peer`; each is dearer than those before it, and has room at once."""
    number = int(box.name.rpartition("-")[2])
    price = f"0.0{number:02}"
    offered = offer(MODEL, digest=bytes.fromhex(DIGEST), prices=(price, price, price))
    models = _OFFERS.setdefault(box.name, (offered,))
    advert = SimpleNamespace(models=models, currency="credits", draining=False, cpu_variant="")
    return SimpleNamespace(
        node_id=box.node_id, name=box.name, state="connected", advert=advert, advert_at=0.0,
        loads={}, route=None, gone=False,
    )  # fmt: skip


_OFFERS: dict[str, Any] = {}


async def _digest(model: Model) -> str:
    return DIGEST


async def _no_debts() -> dict[str, dict[str, int]]:
    return {}


class OwnBackend:
    """What a box serves with itself."""

    def __init__(self, box: ScriptedBox) -> None:
        self._box = box

    def start(self, job: Job) -> ScriptedLeg:
        return self._box.begin(job)


class _Peers:
    """As `legs.client.PeerClient`."""

    def __init__(self, network: Network) -> None:
        self._boxes = {box.node_id: box for box in network.peers}

    def start(self, job: Job, to: Destination) -> ScriptedLeg:
        return self._boxes[to.node_id].begin(job, to.pays_prompt)


async def _ask_loads(model: str) -> None:
    await asyncio.sleep(0)


def alone(box: ScriptedBox) -> LegRunner:
    """What a box without peers serves with."""
    return LegRunner(box.node_id, OwnBackend(box))


def set_patience(monkeypatch: Any, seconds: float) -> None:
    """How long a begun answer waits for a box that goes on with it."""
    monkeypatch.setattr("pinaivu_box.legs.runner._PATIENCE_SECONDS", seconds)


def never_retry(monkeypatch: Any, network: Network) -> None:
    """No box that did not serve is asked again only because time has passed."""
    monkeypatch.setattr("pinaivu_box.legs.runner._RETRY_SECONDS", math.inf)
    monkeypatch.setattr(network.candidates, "next_expiry", lambda: math.inf)
