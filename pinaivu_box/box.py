"""A box while it runs: its services, and how it follows its configuration and its models folder."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from msgspec import Struct

from pinaivu_box import config as configs
from pinaivu_box import logs, settings
from pinaivu_box.audits.finding import Replay
from pinaivu_box.audits.service import AuditService
from pinaivu_box.config import Config
from pinaivu_box.devices import DeviceMonitor
from pinaivu_box.files.store import Digests
from pinaivu_box.gateway.admission import Admission
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.metrics import Metrics
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.refusals import Refusals
from pinaivu_box.gateway.request import RunningRequests
from pinaivu_box.identity import Identity
from pinaivu_box.incidents import Incidents
from pinaivu_box.ledger.session import Ledger
from pinaivu_box.legs.admission import PeerPolicies
from pinaivu_box.legs.boxes import Boxes
from pinaivu_box.legs.wiring import PeerServices
from pinaivu_box.login.oidc import SignOn
from pinaivu_box.login.session_keys import SessionKeys
from pinaivu_box.login.throttle import SignupThrottle, Throttle
from pinaivu_box.models import catalog as catalogs
from pinaivu_box.models import catalog_loader, folder_watch
from pinaivu_box.models.catalog import Catalog
from pinaivu_box.models.header_reader import HeaderReader
from pinaivu_box.models.model_scan import ModelScan
from pinaivu_box.models.names import printable
from pinaivu_box.models.probe import Prober
from pinaivu_box.network.network import Network
from pinaivu_box.receipt_log.service import ReceiptLog
from pinaivu_box.registry.pulls import Pulls
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.routing.offers import Offers
from pinaivu_box.settings import BoxSettings, LiveSettings
from pinaivu_box.store.database import Database
from pinaivu_box.tls import certificate as certificates
from pinaivu_box.tracing.tracer import Tracer
from pinaivu_box.upstream.upstreams import Upstreams
from pinaivu_box.witness.wiring import Witnessing

# Read at the start only: the sockets, and what stands before the routes.
_NEED_RESTART = (
    "server.host", "server.port", "server.cors_origins", "peering.enabled", "peering.host",
    "peering.port", "peering.relay", "peering.name", "peering.announce",
)  # fmt: skip
# These too where they would begin or end TLS; another certificate is used at once.
_CERTIFICATE = ("server.tls", "server.tls_cert", "server.tls_key")
_LOOK_AT_CERTIFICATE_SECONDS = 6 * 3600.0
_SHARED_PREFIXES = "engine.shared_prefixes"
# Of [engine], what applies at once; the rest is given to an engine when it starts.
_APPLY_AT_ONCE = (
    "engine.max_queue", "engine.keep_alive", "engine.max_keep_alive", "engine.start_seconds",
    _SHARED_PREFIXES,
)  # fmt: skip

log = logging.getLogger("pinaivu.box")


class NotServed(Struct, frozen=True):
    """A file that is not served; `reason` is the end of a sentence."""

    path: str
    reason: str


class Reloaded(NamedTuple):
    """What a new configuration changes, by the names of settings: `applied` at once, `engines` for
    engines that start from now on, `restart` when the box is restarted.

    `models` are the ids that are served now.
    """

    applied: list[str]
    engines: list[str]
    restart: list[str]
    models: list[str]
    not_served: list[NotServed]


@dataclass
class Box:
    """The services of a box.

    `read_config` reads the configuration again, with the options that the box was started with.
    `control_token` lets commands on this home use the running server as an admin.
    """

    settings: LiveSettings
    first_config: Config  # that of the start
    read_config: Callable[[], Config]
    home: Path
    identity: Identity
    database: Database
    headers: HeaderReader
    digests: Digests
    devices: DeviceMonitor
    placement: Placement
    admission: Admission
    local: LocalBackend
    requests: RunningRequests
    metrics: Metrics
    refusals: Refusals
    receipt_log: ReceiptLog
    witnessing: Witnessing
    incidents: Incidents
    load: LoadTracker
    offers: Offers
    ledger: Ledger
    upstreams: Upstreams
    boxes: Boxes
    tracer: Tracer
    control_token: str
    replay: Replay  # computes again what peers served
    session_keys: SessionKeys = field(default_factory=SessionKeys)
    login_throttle: Throttle = field(default_factory=Throttle)
    signup_throttle: SignupThrottle = field(default_factory=SignupThrottle)
    sign_on: SignOn = field(default_factory=SignOn)
    logins_running: int = 0  # whose passwords are checked now
    # Held by account while a key of its own is checked and stored.
    own_key_locks: WeakValueDictionary[str, asyncio.Lock] = field(
        default_factory=WeakValueDictionary
    )
    tls: ssl.SSLContext | None = None  # of the server's sockets; None: plain HTTP
    pulls: Pulls = field(default_factory=Pulls)
    prober: Prober = field(default_factory=Prober)
    network: Network | None = None  # all None without [peering]
    peer_policies: PeerPolicies | None = None
    peer_services: PeerServices | None = None
    audits: AuditService | None = None
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # one look at the files at a time
    _lingering: set[str] = field(default_factory=set)  # models that are served until unloaded

    @property
    def config(self) -> Config:
        return self.settings.config

    @property
    def catalog(self) -> Catalog:
        return self.settings.catalog

    async def reload(self) -> Reloaded:
        """Read the configuration and the models again, and use them; running requests go on.

        Raises CliError if they are not valid: then nothing has changed.
        """
        async with self._reading:
            new = await asyncio.to_thread(
                lambda: settings.read(self.read_config(), self.home, self.headers)
            )
            old = self.settings.current
            if self.tls is not None and new.certificate is not None:
                certificates.use(new.certificate, self.tls, self.home)
            self._replace_settings(new)
            return self._differences(old, new)

    def _replace_settings(self, new: BoxSettings) -> None:
        self.settings.current = new
        self._lingering.clear()
        logs.configure(new.config.log)
        self.placement.reloaded()
        self.placement.forget_failures()
        for upstream in self.upstreams.reloaded():
            self.boxes.breaker.served(upstream.id)  # what it was before has failed, if at all
        if self.network is not None:
            self.network.changed()
        folder_watch.report_not_served(new.catalog.not_served)

    def _differences(self, old: BoxSettings, new: BoxSettings) -> Reloaded:
        changed = configs.differences(old.config, new.config)
        if new.shared_prefixes != old.shared_prefixes and _SHARED_PREFIXES not in changed:
            changed.append(_SHARED_PREFIXES)  # the text of a file
        engines = [
            name for name in changed if name.startswith("engine.") and name not in _APPLY_AT_ONCE
        ]
        since_start = configs.differences(self.first_config, new.config)
        need_restart: tuple[str, ...] = _NEED_RESTART
        if new.config.server.uses_tls != self.first_config.server.uses_tls:
            need_restart += _CERTIFICATE
        return Reloaded(
            applied=[name for name in changed if name not in (*need_restart, *engines)],
            engines=engines,
            restart=[name for name in since_start if name in need_restart],
            models=[model.id for model in new.catalog.models],
            not_served=not_served_in(new.catalog),
        )

    async def look_for_models(self, *, removed: Collection[str] = ()) -> None:
        """Serve what is in the models folder now, by its names and aliases; nothing else changes.
        Models that were `removed` take no requests any more, even if they are loaded."""
        async with self._reading:
            await self._read_folder(None, removed)

    async def watch_models(self) -> None:
        """Until cancelled: serve files that come into the models folder once they are written, and
        stop serving those that are gone once they are not loaded."""
        watch = folder_watch.FolderWatch()
        while True:
            await asyncio.sleep(watch.seconds)
            try:
                async with self._reading:
                    folder = catalogs.directory(self.config, self.home)
                    others = self.config.model_caches
                    files = await asyncio.to_thread(watch.look, folder, others)
                    if files is not None:
                        await self._read_folder(files)
                    elif gone := self._lingering - self.placement.loaded:
                        self._lingering -= gone
                        self._serve(self.catalog.without(gone))
            except Exception:
                log.exception("the models folder could not be looked at")

    async def watch_certificate(self) -> None:
        """Until cancelled: renew the certificate that the box made for itself before its end."""
        while True:
            await asyncio.sleep(_LOOK_AT_CERTIFICATE_SECONDS)
            config = self.config.server
            if self.tls is None or not config.tls:
                continue
            try:
                certificate = await asyncio.to_thread(certificates.of, config, self.home)
                if certificate is not None and certificate != self.settings.current.certificate:
                    certificates.use(certificate, self.tls, self.home)
                    self.settings.current = replace(self.settings.current, certificate=certificate)
                    fields = {"fingerprint": certificate.fingerprint}
                    log.info("certificate renewed", extra={"fields": fields})
            except Exception:
                log.exception("the certificate could not be renewed")

    async def _read_folder(self, files: ModelScan | None, removed: Collection[str] = ()) -> None:
        names = {entry.name for entry in self.config.model if entry.path}
        configured = {model.id: model for model in self.catalog.models if model.id in names}
        load = partial(catalog_loader.load, self.config, self.home, self.headers)
        catalog = await asyncio.to_thread(load, scan=files, configured=configured)
        self._lingering.clear()
        self._serve(catalog, removed)

    def _serve(self, new: Catalog, removed: Collection[str] = ()) -> None:
        """Serve this catalog: a model that it lacks stays until it is unloaded unless it was
        `removed`, and one that is being written stays what it was."""
        old, loaded = self.catalog, self.placement.loaded
        ids = {model.id for model in new.models}.union(removed)
        missing = [model for model in old.models if model.id not in ids]
        self._lingering |= {model.id for model in missing if model.id in loaded}
        new = new.with_models(
            model for model in missing if model.id in loaded or new.is_written(model)
        )
        self.settings.current = replace(self.settings.current, catalog=new)
        if folder_watch.report(old, new):
            self.placement.forget_failures()
            if self.network is not None:
                self.network.changed()

    async def drain(self) -> None:
        """Refuse new work and finish the old, up to the configured time; then cancel the rest."""
        self.admission.drain()
        if self.peer_services is not None:
            self.peer_services.serving.draining = True
        if self.network is not None:
            self.network.changed()
        try:
            async with asyncio.timeout(self.config.server.drain_seconds):
                await self.requests.drained()
                if self.peer_services is not None:
                    await self.peer_services.serving.drained()
        except TimeoutError:
            await self.requests.cancel_all()


def not_served_in(catalog: Catalog) -> list[NotServed]:
    return [NotServed(printable(str(path)), why) for path, why in catalog.not_served.items()]
