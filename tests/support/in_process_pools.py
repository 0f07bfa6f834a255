"""Boxes of one process without a server: real engines, the memory transport, and a network of
links that are made when somebody needs them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from nacl.signing import SigningKey
from ulid import ULID

from pinaivu_box.config import Config, EngineConfig, ModelConfig
from pinaivu_box.engine.messages import SamplingParams
from pinaivu_box.errors import PeeringError
from pinaivu_box.gateway.backend import Event, Job
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.records import ChoiceRecord
from pinaivu_box.gateway.request_spans import RequestSpans
from pinaivu_box.gossip.adverts import Advert
from pinaivu_box.gossip.loads import ReportedLoad
from pinaivu_box.identity import Identity
from pinaivu_box.ledger.entry import Balance, LedgerEntry
from pinaivu_box.legs.runner import LegRun
from pinaivu_box.legs.wiring import PeerServices
from pinaivu_box.membership.records import key_of
from pinaivu_box.models import catalog_loader
from pinaivu_box.models.catalog import Catalog, Model, digest_of
from pinaivu_box.network.peer import Peer
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.policy import PeerPolicy
from pinaivu_box.routing.candidates import Debts
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.offers import Offers
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.tasks import TaskSet
from pinaivu_box.transport.link import Link, Stream
from pinaivu_box.transport.streams import StreamHandler
from pinaivu_box.upstream.upstreams import Upstreams
from tests.support.memory_transport import MemoryNetwork, MemoryTransport

FAKE = "fake:1"
PROMPT = "Tell me about the sea."


class PoolLinks:
    """As `peering.network.Network`, among the pools of one process."""

    def __init__(self, transport: MemoryTransport, everybody: dict[str, PoolNode]) -> None:
        self.handlers: dict[str, StreamHandler] = {}
        self.others: list[str] = []
        self.looked: Callable[[], None] | None = None
        self.looks = 0
        self._transport, self._everybody = transport, everybody
        self._links: dict[str, Link] = {}
        self._tasks = TaskSet()

    def peers(self) -> list[Peer]:
        return [self._everybody[name].seen() for name in self.others]

    def changed(self) -> None:
        pass

    async def query_load(self, model: str) -> None:
        self.looks += 1
        if self.looked is not None:
            self.looked()

    async def open(self, peer: str, purpose: str, timeout: float = 5.0) -> Stream:
        if peer not in self._links:
            where = self._everybody[peer].transport.addresses()
            self._links[peer] = await self._transport.connect(peer, where, timeout)
        try:
            return await self._links[peer].open()
        except PeeringError:
            del self._links[peer]
            raise

    async def serve(self) -> None:
        while True:
            self._tasks.spawn(self._serve_link(await self._transport.accept()))

    async def _serve_link(self, link: Link) -> None:
        with contextlib.suppress(PeeringError):
            while True:
                self._tasks.spawn(self._serve_stream(link.peer, await link.accept()))

    async def _serve_stream(self, peer: str, stream: Stream) -> None:
        try:
            await self.handlers["work"](peer, stream)
        except (PeeringError, TimeoutError):
            stream.abandon()


class Books:
    """As `gateway.books.Books`, in memory: `kept` are the legs that it served or had served."""

    def __init__(self) -> None:
        self.peer_policy = PeerPolicy()
        self.owed = 0  # by each peer
        self.kept: list[LedgerEntry] = []

    async def policy(self, peer: str) -> PeerPolicy:
        return self.peer_policy

    async def balance(self, peer: str, currency: str) -> Balance:
        return Balance(waiting=self.owed)

    async def recent(self, peer: str) -> list[tuple[float, int]]:
        return []

    async def served(self, peer: str, request_id: str, leg: int, choice: int) -> bool:
        return False

    async def debts(self) -> Debts:
        return {}

    async def keep(self, entry: LedgerEntry) -> None:
        self.kept.append(entry)


class PoolNode:
    """One box."""

    def __init__(
        self, name: str, world: MemoryNetwork, everybody: dict[str, PoolNode], config: Config
    ) -> None:
        self.name = name
        self.identity = Identity(SigningKey(name.encode().ljust(32, b".")))
        self.node_id = self.identity.node_id
        self.transport = MemoryTransport(world, self.node_id)
        self.links = PoolLinks(self.transport, everybody)
        catalog = catalog_loader.load(config, Path("/nonexistent"))
        self.settings = LiveSettings(BoxSettings(config, catalog))
        self.placement = Placement(self.settings, _digest)
        self.local = LocalBackend(self.placement, self.node_id, self.settings)
        self.books = Books()
        self.gone = self.silent = False
        self.told: dict[str, ReportedLoad] = {}  # by its neighbours
        self.load = LoadTracker(self.placement)
        self.upstreams = Upstreams(self.settings, self.node_id)
        self.offers = Offers(self.settings, self.load, _digest, lambda: False, self.upstreams)
        self.pool = PeerServices(
            self.identity,
            self.settings,
            self.placement,
            self.local,
            self.load,
            self.links,  # type: ignore[arg-type]
            self.books.policy,
            self.books,  # type: ignore[arg-type]
            self._writable,
            self.upstreams,
            lambda _: None,
            RequestSpans(self.node_id, lambda _: None, lambda _: None),
        )
        everybody[self.node_id] = self

    @property
    def catalog(self) -> Catalog:
        return self.settings.catalog

    @property
    def kept(self) -> list[LedgerEntry]:
        return self.books.kept

    def serves(self, **policy: Any) -> None:
        """What peers may have here: changes of the usual."""
        self.books.peer_policy = msgspec.structs.replace(self.books.peer_policy, **policy)

    async def _writable(self) -> None:
        pass

    def seen(self) -> Peer:
        facts = self.offers.describe()
        advert = Advert(
            network=b"n" * 36,
            node=key_of(self.node_id),
            serial=1,
            at=0,
            life=15,
            version="test",
            addresses=(),
            currency=facts.currency,
            models=facts.models,
            draining=facts.draining,
        )
        return Peer(
            self.node_id, self.name, "connected", "", (), None, "test", 0.0,
            None if self.silent else advert, time.monotonic(), self.gone, "", False, 0.0, self.told,
        )  # fmt: skip

    def job(self, text: str = PROMPT, **more: Any) -> Job:
        model = self.pool.candidates.find(more.pop("model", FAKE))
        base = Job(
            request_id=f"req_{ULID()}".lower(),
            model=model,
            messages=[{"role": "user", "content": text}],
            sampling=SamplingParams(seed=7),
            max_tokens=20,
            stop=[],
            tenant="key_1",
        )
        return replace(base, **more)

    async def ask(self, **more: Any) -> list[Event]:
        """All events of a job, and of its legs."""
        return await self.serve(ChoiceRecord(self.job(**more)))

    async def serve(
        self, choice: ChoiceRecord, watch: Callable[[LegRun, list[Event]], None] | None = None
    ) -> list[Event]:
        """All events of a choice; `watch` sees each when it comes."""
        events: list[Event] = []

        def take(event: Event) -> None:
            events.append(event)
            if watch is not None:
                watch(run, events)

        run = self.pool.runner.start(choice, take)
        await run.run()
        return events


async def _digest(model: Model) -> str:
    return digest_of(model)


def config(*models: str, engine: dict[str, Any] | None = None, **peering: Any) -> Config:
    return Config(
        engine=EngineConfig(context=2048, **(engine or {})),
        peering=PeeringConfig(enabled=True, **peering),
        model=[
            ModelConfig(name=name, path=f"fake:{ms}") for name, ms in (m.split("=") for m in models)
        ],
    )


@contextlib.asynccontextmanager
async def pools(**configs: Config) -> AsyncIterator[list[PoolNode]]:
    """Boxes that all know each other."""
    world, everybody = MemoryNetwork(), dict[str, PoolNode]()
    nodes = [PoolNode(name, world, everybody, made) for name, made in configs.items()]
    tasks = []
    for node in nodes:
        node.links.others = [one.node_id for one in nodes if one is not node]
        learned = asyncio.Event()
        tasks.append(asyncio.create_task(node.offers.keep_learning(learned.set)))
        if node.catalog.models:
            await learned.wait()
        tasks.append(asyncio.create_task(node.links.serve()))
    try:
        yield nodes
    finally:
        for task in tasks:
            task.cancel()
        for node in nodes:
            await node.transport.close()
            await node.placement.close()
