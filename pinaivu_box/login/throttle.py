"""Slows down who guesses passwords: by account and address, by address, and by account.

After so many failures the next attempt has to wait, twice as long after each one more.  The pair of
an account and an address waits longest.  An account alone waits shortly, and only at addresses that
it has not logged in from: nobody can lock a person out from elsewhere.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pinaivu_box.bounded import BoundedDict

_MAX_ENTRIES = 10_000  # of each kind
_HOUR = 3600.0
_SIGNUPS_OF_ADDRESS, _SIGNUPS = 5, 100  # in an hour
_FORGOTTEN_AFTER = _HOUR  # seconds without a failure
_IPV6_NETWORK = 64  # one customer has all of its addresses


class _Limit(NamedTuple):
    """`free` failures cost nothing; from then on one waits a second, and twice as long after each
    further failure, up to `longest` seconds."""

    free: int
    longest: float

    def wait(self, failures: int) -> float:
        over = failures - self.free
        return 0.0 if over < 0 else min(2.0 ** min(over, 60), self.longest)


_OF_PAIR = _Limit(5, 900.0)
_OF_ADDRESS = _Limit(20, 900.0)
_OF_ACCOUNT = _Limit(20, 10.0)


class _FailedLogins(NamedTuple):
    number: int
    last: float


class Throttle:
    """Use `wait`, then `attempt` before a password is checked, then `succeeded` if it was right: an
    attempt counts as a failure until then, so that many at the same time gain nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pairs: BoundedDict[str, _FailedLogins] = BoundedDict(_MAX_ENTRIES)
        self._addresses: BoundedDict[str, _FailedLogins] = BoundedDict(_MAX_ENTRIES)
        self._accounts: BoundedDict[str, _FailedLogins] = BoundedDict(_MAX_ENTRIES)

    def wait(self, account: str, address: str, *, known: bool = False) -> int:
        """Whole seconds until the next attempt is allowed; 0: now.  `known`: the account has logged
        in from that address before."""
        now, longest = self._clock(), 0.0
        for entries, key, limit in self._kept(account, address):
            if known and entries is self._accounts:
                continue
            failures = _current(entries, key, now)
            longest = max(longest, failures.last + limit.wait(failures.number) - now)
        return math.ceil(longest)

    def attempt(self, account: str, address: str) -> None:
        now = self._clock()
        for entries, key, _ in self._kept(account, address):
            entries[key] = _FailedLogins(_current(entries, key, now).number + 1, now)

    def succeeded(self, account: str, address: str) -> None:
        for entries, key, _ in self._kept(account, address):
            if entries is not self._addresses:
                entries.pop(key, None)
            # An account of one's own makes no guesses at others free.
            elif (failures := entries.get(key)) is not None:
                entries[key] = failures._replace(number=failures.number - 1)

    def _kept(
        self, account: str, address: str
    ) -> Iterator[tuple[BoundedDict[str, _FailedLogins], str, _Limit]]:
        network = network_of(address)
        yield self._pairs, f"{network} {account}", _OF_PAIR
        yield self._addresses, network, _OF_ADDRESS
        yield self._accounts, account, _OF_ACCOUNT


class SignupThrottle:
    """At most so many new accounts for an address, and for all together, in an hour."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._made: deque[tuple[float, str]] = deque()

    def wait(self, address: str) -> int:
        """Whole seconds until the next account may be made from that address; 0: now."""
        now, network = self._clock(), network_of(address)
        while self._made and now - self._made[0][0] > _HOUR:
            self._made.popleft()
        own = [at for at, one in self._made if one == network]
        begins = []
        if len(own) >= _SIGNUPS_OF_ADDRESS:
            begins.append(own[-_SIGNUPS_OF_ADDRESS])
        if len(self._made) >= _SIGNUPS:
            begins.append(self._made[-_SIGNUPS][0])
        return math.ceil(max(begins) + _HOUR - now) if begins else 0

    def attempt(self, address: str) -> None:
        self._made.append((self._clock(), network_of(address)))


def network_of(address: str) -> str:
    """What stands for one sender: an IPv4 address, or the network of an IPv6 address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(ip), _IPV6_NETWORK), strict=False))
        return str(ip.ipv4_mapped)
    return str(ip)


def _current(entries: BoundedDict[str, _FailedLogins], key: str, now: float) -> _FailedLogins:
    failures = entries.get(key)
    if failures is None or now - failures.last > _FORGOTTEN_AFTER:
        return _FailedLogins(0, -math.inf)
    return failures
