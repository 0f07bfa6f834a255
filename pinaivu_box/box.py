"""The one place where a box's services are made and joined."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pinaivu_box import identity as identities
from pinaivu_box.config import Config
from pinaivu_box.errors import CliError
from pinaivu_box.gateway.admission import Admission
from pinaivu_box.gateway.local import LocalBackend
from pinaivu_box.gateway.metering import Meter
from pinaivu_box.gateway.metrics import Metrics
from pinaivu_box.gateway.placement import Placement
from pinaivu_box.gateway.requests import Requests
from pinaivu_box.identity import Identity
from pinaivu_box.models import catalog as catalogs
from pinaivu_box.models.catalog import Catalog, Model
from pinaivu_box.store import model_files
from pinaivu_box.store.database import Database


@dataclass(frozen=True)
class Box:
    """`control_token` lets commands on this home speak to the running server as an admin."""

    config: Config
    home: Path
    identity: Identity
    database: Database
    catalog: Catalog
    placement: Placement
    admission: Admission
    local: LocalBackend
    requests: Requests
    metrics: Metrics
    control_token: str

    async def drain(self) -> None:
        """Refuse new work and finish the old, up to the configured time; then cancel the rest."""
        self.admission.draining = True
        try:
            await asyncio.wait_for(self.requests.drained(), self.config.server.drain_seconds)
        except TimeoutError:
            await self.requests.cancel_all()


def prepare_home(home: Path) -> Path:
    """Make the home directory (0700) if it is not there."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A mode given to mkdir is subject to the umask, and the directory may be older.
        home.chmod(0o700)
    except OSError as error:
        raise CliError(f"The home {home} cannot be used: {error.strerror}.") from error
    return home


def database_of(home: Path) -> Database:
    return Database(prepare_home(home) / "pinaivu.db")


def identity_of(home: Path) -> Identity:
    return identities.load_or_create(prepare_home(home) / "identity.key")


@asynccontextmanager
async def open_box(config: Config, home: Path) -> AsyncIterator[Box]:
    """A box on that home, which no other server has at the same time."""
    lock = _lock(prepare_home(home))
    try:
        async with database_of(home) as database:
            box = _join(config, home, database)
            try:
                yield box
            finally:
                await box.placement.close()
    finally:
        lock.close()


def _join(config: Config, home: Path, database: Database) -> Box:
    identity = identity_of(home)
    catalog = catalogs.load(config, home)

    async def digest(model: Model) -> str:
        return await model_files.digest(database, model)

    placement = Placement(config.engine, digest)
    backend = LocalBackend(placement, identity.node_id, config.sampling)
    meter = Meter(identity, database, config.pricing)
    metrics = Metrics(placement)
    return Box(
        config=config,
        home=home,
        identity=identity,
        database=database,
        catalog=catalog,
        placement=placement,
        admission=Admission(catalog, config.engine),
        local=backend,
        requests=Requests(backend, meter, metrics),
        metrics=metrics,
        control_token=secrets.token_hex(32),
    )


def _lock(home: Path) -> IO[str]:
    handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(handle, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CliError(
            f"Another box is running on {home}: stop it, or choose another --home."
        ) from error
    return file
