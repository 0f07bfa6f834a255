"""The one place where a box's services are made and joined."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pinaivu_box import __version__, box_metrics, heap, settings
from pinaivu_box.audits.local_replay import LocalReplay
from pinaivu_box.audits.service import AuditService
from pinaivu_box.box import Box
from pinaivu_box.config import Config
from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.errors import CliError
from pinaivu_box.files.store import Digests
from pinaivu_box.files.upload import FileServer
from pinaivu_box.gateway.admission import Admission, check_writable
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.metering import Meter
from pinaivu_box.gateway.metrics import Metrics
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.refusals import Refusals
from pinaivu_box.gateway.request import RunningRequests
from pinaivu_box.gateway.request_spans import RequestSpans
from pinaivu_box.gateway.saved_prefixes import SavedPrefixFolder
from pinaivu_box.home import database_of, identity_of, lock, prepare_home
from pinaivu_box.incidents import IncidentMetrics, Incidents
from pinaivu_box.ledger.session import PURPOSE as LEDGER_PURPOSE
from pinaivu_box.ledger.session import Ledger
from pinaivu_box.legs.admission import PeerPolicies
from pinaivu_box.legs.recorder import LedgerRecorder
from pinaivu_box.legs.runner import LegRunner
from pinaivu_box.legs.wiring import PeerServices, without_peers
from pinaivu_box.models.catalog import Catalog
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.network.network import Network
from pinaivu_box.receipt_log.metrics import LogMetrics
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.routing import reputation
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.offers import Offers
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.store import responses, retention
from pinaivu_box.store.database import Database
from pinaivu_box.tasks import TaskSet
from pinaivu_box.tls import certificate as certificates
from pinaivu_box.tracing.tracer import Tracer
from pinaivu_box.upstream.metrics import UpstreamMetrics
from pinaivu_box.upstream.upstreams import Upstreams
from pinaivu_box.witness.alarms import ForkMetrics
from pinaivu_box.witness.wiring import Witnessing


@asynccontextmanager
async def open_box(read_config: Callable[[], Config], home: Path) -> AsyncIterator[Box]:
    """A box on that home, which no other server uses at the same time.  Raises CliError."""
    with lock(prepare_home(home)):
        async with database_of(home, locked=True) as database:
            await responses.fail_unfinished(database)
            config, headers = read_config(), HeaderReader()
            current = await asyncio.to_thread(settings.read, config, home, headers)
            box = _join(read_config, current, home, database, headers)
            if current.certificate is not None:
                box.tls = certificates.context_of(current.certificate)
                certificates.publish(home, current.certificate.pem)
            background = TaskSet()
            await box.receipt_log.open()
            background.spawn(box.receipt_log.keep())
            await box.witnessing.open()
            background.spawn(
                retention.apply_hourly(
                    database, lambda: box.config.retention, box.receipt_log.removals
                )
            )
            background.spawn(box.watch_models())
            background.spawn(box.session_keys.drop_ended_hourly(database))
            background.spawn(box.watch_certificate())
            background.spawn(heap.trim_each_minute())
            await box.incidents.open()
            box.placement.start()
            try:
                async with _peering(box):
                    await box.upstreams.open()
                    background.spawn(box.witnessing.keep())
                    yield box
            finally:
                await box.upstreams.close()
                headers.stop()
                await background.cancel()
                await box.witnessing.close()
                await box.placement.close()
                box.devices.close()
                await box.digests.close()
                await box.refusals.flush()
                await box.receipt_log.cover()
                await box.tracer.close()
                await box.incidents.close()


@asynccontextmanager
async def _open_network(box: Box) -> AsyncIterator[Network]:
    """The network on its transport, started but not yet running.

    Raises CliError if it cannot listen.
    """
    try:
        from pinaivu_box.transport.iroh_transport import IrohTransport
    except (ImportError, OSError) as error:
        raise CliError(
            f"Peering is not possible on this machine, for iroh cannot be loaded: {error}."
        ) from error
    peering = box.config.peering
    transport = await IrohTransport.bind(box.identity, peering.host, peering.port, peering.relay)
    network = Network(
        box.identity, transport, box.database, lambda: box.config.peering, box.offers.describe
    )
    try:
        await network.start()
        yield network
    finally:
        await network.close()


@asynccontextmanager
async def _peering(box: Box) -> AsyncIterator[None]:
    if not box.config.peering.enabled:
        yield
        return
    async with _open_network(box) as network:
        box.network = network
        policies = box.peer_policies = PeerPolicies(box.database, box.settings)
        services = _peer_services(box, network, policies)

        async def shared(peer: str) -> Catalog | str:
            """The models that the peer may copy, or why there are none."""
            if not box.config.peering.share_models:
                return "this box does not share its models with yours"
            policy = await policies.of(peer)
            return policy.refusal or box.catalog.matching(policy.models)

        def rate() -> float:
            return box.config.peering.serve.copy_mb_per_s * 1e6

        def is_back(peer: str, lost_at: float) -> bool:
            """Whether others have heard from a lost peer since, or it is no member any more."""
            found = next((known for known in network.peers() if known.node_id == peer), None)
            if found is None or found.state in ("connected", "revoked"):
                return True
            return not found.gone and found.advert_at is not None and found.advert_at > lost_at

        box.incidents.is_back = is_back
        network.peer_lost = box.incidents.peer_lost

        def peer_is_back(peer: str) -> None:
            box.incidents.peer_is_back(peer)
            box.witnessing.is_back(peer)

        network.peer_is_back = peer_is_back
        box.witnessing.join(network)
        services.reputation.forked = box.witnessing.alarms.why_distrusted
        network.handlers[LEDGER_PURPOSE] = box.ledger.handle
        network.handlers["model"] = FileServer(shared, box.digests, rate).serve
        running, background = TaskSet(), TaskSet()
        running.spawn(network.run())
        background.spawn(box.offers.keep_learning(network.changed))
        background.spawn(reputation.load_and_save(services.reputation, box.database))
        background.spawn(_audits(box, services).run())
        if box.config.peering.announce:
            background.spawn(_announce(network))
        try:
            yield
        finally:
            await background.cancel()
            await network.close()
            services.close()
            await running.cancel()


def _peer_services(box: Box, network: Network, policies: PeerPolicies) -> PeerServices:
    """Let requests go to peers from now on, and serve theirs."""
    services = box.peer_services = PeerServices(
        identity=box.identity,
        settings=box.settings,
        placement=box.placement,
        local=box.local,
        load=box.load,
        network=network,
        policy=policies.of,
        recorder=LedgerRecorder(box.database, box.identity.node_id),
        writable=lambda: check_writable(box.database),
        upstreams=box.upstreams,
        begin_span=box.tracer.begin,
        spans=_spans(box),
    )
    box.boxes = box.admission.tokenizer = services.boxes
    box.admission.remote = services.candidates
    box.requests.runner = services.runner
    return services


def _audits(box: Box, services: PeerServices) -> AuditService:
    """Audit what peers serve from now on, in idle time."""
    audits = box.audits = AuditService(
        identity=box.identity,
        settings=box.settings,
        database=box.database,
        reputation=services.reputation,
        replay=box.replay,
        busy=lambda: bool(box.requests.count),
        busy_for_peers=lambda: not services.serving.admission.idle.is_set(),
        registry=box.metrics.registry,
    )
    box.requests.receipted = audits.sampled.take
    return audits


async def _announce(network: Network) -> None:
    from pinaivu_box.transport.lan import announce  # loads zeroconf, which few want

    await announce(network.node_id, network.name, __version__, network.own_addresses())


def _join(
    read_config: Callable[[], Config],
    current: BoxSettings,
    home: Path,
    database: Database,
    headers: HeaderReader,
) -> Box:
    live = LiveSettings(current)
    identity = identity_of(home)
    digests = Digests(database)
    devices = DeviceMonitor()
    placement = Placement(live, digests.of, devices)
    prefixes = SavedPrefixFolder(home, identity, live)
    placement.saved_prefixes = prefixes.of
    local = LocalBackend(placement, identity.node_id, live)
    metrics = Metrics(placement, devices)
    load = LoadTracker(placement)
    upstreams = Upstreams(live, identity.node_id)
    incidents = Incidents(database)
    receipt_log = ReceiptLog(identity, database, home)
    witnessing = Witnessing(identity, database, receipt_log, lambda: live.config.witness)
    boxes = without_peers(identity.node_id, live, placement, local, load, upstreams)
    requests = RunningRequests(
        LegRunner(identity.node_id, local, boxes), Meter(identity, database, live), metrics, live
    )
    admission = Admission(live, boxes, database, requests.in_flight)
    admission.remote = boxes.candidates
    placement.waiting = requests.in_flight
    tracer = Tracer(live, identity.node_id, metrics.registry)
    requests.places = admission.places = placement.places
    box = Box(
        settings=live,
        first_config=current.config,
        read_config=read_config,
        home=home,
        identity=identity,
        database=database,
        headers=headers,
        digests=digests,
        replay=LocalReplay(live, digests.of, digests.known),
        devices=devices,
        placement=placement,
        admission=admission,
        local=local,
        requests=requests,
        metrics=metrics,
        refusals=Refusals(database, metrics),
        receipt_log=receipt_log,
        witnessing=witnessing,
        incidents=incidents,
        load=load,
        offers=Offers(live, load, digests.of, lambda: admission.draining, upstreams),
        ledger=Ledger(identity, database),
        upstreams=upstreams,
        boxes=boxes,
        tracer=tracer,
        control_token=secrets.token_hex(32),
    )
    _observe(box)
    return box


def _observe(box: Box) -> None:
    """Let metrics, incidents and spans see what happens."""
    registry = box.metrics.registry
    registry.register(UpstreamMetrics(box.upstreams))
    registry.register(ForkMetrics(box.witnessing.alarms))
    registry.register(LogMetrics(box.receipt_log))
    registry.register(IncidentMetrics(box.incidents))
    box_metrics.register(registry, box.database, _state_of(box))
    box.placement.engine_died = box.incidents.engine_died
    box.requests.ended = _spans(box).ended


def _spans(box: Box) -> RequestSpans:
    return RequestSpans(box.identity.node_id, box.settings.address_of_upstream, box.tracer.add)


def _state_of(box: Box) -> box_metrics.BoxState:
    def peers() -> list[str]:
        return [] if box.network is None else [peer.state for peer in box.network.peers()]

    def left_alone() -> dict[str, int]:
        names = set(box.boxes.breaker.open())
        upstreams = {upstream.id for upstream in box.upstreams.all}
        return {"peer": len(names - upstreams), "upstream": len(names & upstreams)}

    def expires() -> float | None:
        certificate = box.settings.current.certificate
        return None if certificate is None else certificate.expires

    return box_metrics.BoxState(lambda: box.requests.count, peers, left_alone, expires)
