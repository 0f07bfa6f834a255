"""Metrics of the box as a whole: build, process, store, peers, certificate."""

from __future__ import annotations

import platform
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pinaivu_box import __version__
from pinaivu_box.store.database import Database

_COMMIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_PEER_STATES = ("connected", "connecting", "unreachable")


@dataclass(frozen=True)
class BoxState:
    """What is read when it is scraped: running requests, the states of peers, how many peers and
    upstreams the circuit breaker leaves alone, and when the certificate expires (Unix seconds;
    None: plain HTTP)."""

    running: Callable[[], int]
    peers: Callable[[], Iterable[str]]
    left_alone: Callable[[], dict[str, int]]
    certificate_expires: Callable[[], float | None]


def register(registry: CollectorRegistry, database: Database, state: BoxState) -> None:
    ProcessCollector(registry=registry)
    registry.register(_BoxCollector(database, state))
    commits = Histogram(
        "pinaivu_store_commit_seconds",
        "How long it took to write a batch to disk.",
        buckets=_COMMIT_SECONDS,
        registry=registry,
    )
    database.committed = commits.observe


class _BoxCollector(Collector):
    def __init__(self, database: Database, state: BoxState) -> None:
        self._database, self._state = database, state

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "pinaivu_build_info", "This program; always 1.", labels=["version", "python"]
        )
        build.add_metric([__version__, platform.python_version()], 1)
        yield build
        yield GaugeMetricFamily(
            "pinaivu_requests_running",
            "Requests that run or wait.",
            value=self._state.running(),
        )
        peers = GaugeMetricFamily("pinaivu_peers", "Peers by state.", labels=["state"])
        states = Sums(self._state.peers())
        for name in _PEER_STATES:
            peers.add_metric([name], states[name])
        yield peers
        breakers = GaugeMetricFamily(
            "pinaivu_circuit_breakers_open",
            "Peers and upstreams that have failed and are left alone.",
            labels=["kind"],
        )
        for kind, count in self._state.left_alone().items():
            breakers.add_metric([kind], count)
        yield breakers
        yield from self._store()
        certificate = GaugeMetricFamily(
            "pinaivu_certificate_expiry_timestamp_seconds",
            "When the certificate of the server expires, in Unix time.",
        )
        if (expires := self._state.certificate_expires()) is not None:
            certificate.add_metric([], expires)
        yield certificate

    def _store(self) -> Iterator[Metric]:
        path = self._database.path
        yield GaugeMetricFamily(
            "pinaivu_store_size_bytes",
            "Size of the database with its write-ahead log.",
            value=sum(map(_size, (path, path.with_name(path.name + "-wal")))),
        )
        yield GaugeMetricFamily(
            "pinaivu_store_writable",
            "Whether the last write to the database succeeded, or the next may.",
            value=not self._database.failing,
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
