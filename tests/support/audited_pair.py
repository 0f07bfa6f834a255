"""Two boxes, of which one asks and audits and the other serves: the sampled audits of a real box,
with a choice of what is audited that a seed decides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from ulid import ULID

from pinaivu_box import idle_time
from pinaivu_box.audits.choice import AuditChoice
from pinaivu_box.config import ModelConfig
from pinaivu_box.engine.messages import Output
from pinaivu_box.gateway.backend import Event, Job
from pinaivu_box.gateway.local import LocalBackend, LocalLeg
from pinaivu_box.home import database_of, prepare_home
from pinaivu_box.server import access_log
from pinaivu_box.store.peer_tables import PeerAudits
from tests.support.in_process_box import InProcessBox, in_process_box
from tests.support.memory_transport import MemoryNetwork
from tests.support.waiting import soon, wait_until


class AuditedPair:
    """`anna` sends all requests for `model` to `ben`, and audits as her configuration says."""

    def __init__(self, anna: InProcessBox, ben: InProcessBox, model: str) -> None:
        self.anna, self.ben, self.model = anna, ben, model
        assert anna.box.audits is not None
        self._audits = anna.box.audits.sampled

    @property
    def known(self) -> PeerAudits:
        """What audits have found of ben since the run began."""
        return self._audits.audits[self.ben.node_id]

    async def found_after(self, seed: int, most: int) -> int | None:
        """Ask a peer that nobody knows until an audit of it has failed: after how many requests,
        None if not within `most`.  What is audited of request n is known before n + 1 is sent."""
        random = Random(seed)
        self._audits._choice = choice = AuditChoice(random.randbytes(32))
        self._audits.audits.clear()
        self.anna.forget()
        for number in range(1, most + 1):
            with _named_by(random):
                await soon(self._ask_and_wait(number, choice))
            if self.known.failed:
                return number
        return None

    async def _ask_and_wait(self, number: int, choice: AuditChoice) -> None:
        """Until ben has served a request, and it was audited if it is chosen."""
        before, served = self.known, False
        while not served:
            request_id = await self._ask(number)
            found = (await self.anna.http("GET", f"/v1/receipts/{request_id}")).json()
            served = found["node_id"] == self.ben.node_id
            if not served:  # on a busy machine he was too slow for her
                self.anna.forget()
        await wait_until(lambda: self.known != before)
        if choice.is_chosen(request_id, before, self._audits._config()):
            await wait_until(lambda: _decided(self.known) > _decided(before))

    async def _ask(self, number: int) -> str:
        """The id of a request."""
        answer = await self.anna.chat(f"Tell me about {number}.", model=self.model, max_tokens=12)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])


def _decided(known: PeerAudits) -> int:
    return known.audits + known.undecided


@contextmanager
def _named_by(random: Random) -> Iterator[None]:
    """Requests have ids that follow from it, so that what is chosen does."""
    with patch.object(access_log, "ULID", lambda: ULID.from_bytes(random.randbytes(16))):
        yield


@asynccontextmanager
async def audited_pair(
    folder: Path, model: str | ModelConfig, of_ben: str | ModelConfig, **settings: Any
) -> AsyncIterator[AuditedPair]:
    """`of_ben` is the model as ben has it, which may be another file: he says that it is anna's.
    With the shares of the default configuration; audits begin without waiting."""
    net = MemoryNetwork()
    name = model if isinstance(model, str) else model.name
    async with AsyncExitStack() as stack:
        for seconds, value in (("_IDLE_SECONDS", 0.04), ("_LOOK_SECONDS", 0.02)):
            stack.enter_context(patch.object(idle_time, seconds, value))
        enter = stack.enter_async_context
        dear = {"pricing__per_1k_tokens": "10", "peering__policy": "cheapest", **settings}
        cheap = {"pricing__per_1k_tokens": "0.01", **settings}
        anna = await enter(in_process_box(net, folder / "anna", (model,), **dear))
        if isinstance(of_ben, ModelConfig):
            await _lie(folder / "ben", Path(of_ben.path), await _digest(anna, name))
        ben = await enter(in_process_box(net, folder / "ben", (of_ben,), **cheap))
        await soon(ben.network.join(await anna.network.invite()))
        await wait_until(lambda: _offers(anna, name))
        yield AuditedPair(anna, ben, name)


def speak_loudly(box: InProcessBox) -> None:
    """From now on it serves other tokens than the model's, and signs them as the model's."""
    serving: Any = box.pool.serving
    serving._local = _Loud(serving._local)


class _Loud:
    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    def start(self, job: Job) -> Any:
        return _LoudLeg(self._backend.start(job))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _LoudLeg:
    def __init__(self, leg: LocalLeg) -> None:
        self._leg = leg

    def cancel(self) -> None:
        self._leg.cancel()

    async def run(self, take: Callable[[Event], None]) -> None:
        def louder(event: Event) -> None:
            if isinstance(event, Output):
                event.text = event.text.upper()
                event.tokens = [*event.text.encode()]  # as the fake model's tokens are
            take(event)

        await self._leg.run(louder)


async def _lie(home: Path, file: Path, digest: str) -> None:
    """The box on that home will say that its file has that digest."""
    facts = file.stat()  # noqa: ASYNC240
    row = (str(file), facts.st_size, facts.st_mtime_ns, digest)
    async with database_of(prepare_home(home)) as database:
        await database.write(("INSERT INTO model_files VALUES (?, ?, ?, ?)", row))


async def _digest(box: InProcessBox, name: str) -> str:
    (model,) = [one for one in box.box.catalog.models if one.id == name]
    return await box.box.digests.of(model)


def _offers(box: InProcessBox, name: str) -> bool:
    return any(one.id == name for _, one in box.pool.candidates._offers())
