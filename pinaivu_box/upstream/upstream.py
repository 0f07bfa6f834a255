"""One upstream: its models, whether it is well, how busy and how fast it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from pinaivu_box.config import ModelSettings
from pinaivu_box.errors import ApiError
from pinaivu_box.gateway.backend import Job
from pinaivu_box.gateway.records import LegRecord
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.names import is_model_id
from pinaivu_box.receipts.receipt import upstream_digest
from pinaivu_box.secret import Secret
from pinaivu_box.upstream import wire
from pinaivu_box.upstream.leg import LegAtUpstream
from pinaivu_box.upstream.places import Places
from pinaivu_box.upstream_config import UpstreamConfig

if TYPE_CHECKING:
    from pinaivu_box.upstream.client import UpstreamClient

log = logging.getLogger("pinaivu.upstream")

OWNER = "upstream"  # of its models, in lists
_LOOK_SECONDS = 10.0  # that it may take to say how it is
_MAX_MODELS = 4096  # that are taken over from one upstream
_FAILS_OFTEN = 3
_LATELY = 32  # legs that a median is of
_TTFT_MS, _TOKENS_PER_S = 500.0, 30.0  # until something was measured
_decode_models = msgspec.json.Decoder(wire.UpstreamModels).decode


class Upstream:
    """`id` stands for it among the node ids of boxes.  `down` says why it cannot be used, in a few
    words; None if it can."""

    def __init__(self, config: UpstreamConfig, key: Secret | None, node_id: str) -> None:
        from pinaivu_box.upstream.client import UpstreamClient  # loads httpx, for few boxes

        self.config, self.key = config, key
        self.name, self.id = config.name, f"upstream:{config.name}"
        self.client: UpstreamClient = UpstreamClient(config, key)
        self.places = Places(config.concurrency)
        self.down: str | None = None
        self.looked = asyncio.Event()  # for the first time
        self._node_id = node_id
        self._listed: dict[str, int] = {}  # what it says it has, with their contexts
        self.models: dict[str, str]  # by their names here, their names there
        self._catalog: dict[str, Model]
        self._busy_until = 0.0
        self._failed_in_a_row = 0
        self._since = int(time.time())
        self._ttft: deque[float] = deque(maxlen=_LATELY)
        self._speed: deque[float] = deque(maxlen=_LATELY)
        self._take_over()

    # -- models ------------------------------------------------------------------------------------

    def _wanted(self) -> dict[str, str]:
        """Those of its models that the configuration names."""
        wanted = self.config.models
        if isinstance(wanted, dict):
            return wanted
        found = {name: name for name in wanted if "*" not in name}
        globs = [name for name in wanted if "*" in name]
        for name in self._listed:
            if is_model_id(name) and any(fnmatchcase(name, glob) for glob in globs):
                found.setdefault(name, name)
        return found

    def model(self, model_id: str) -> Model:
        """One of them, as the catalog would have it."""
        return self._catalog.get(model_id) or self._described(model_id)

    def _take_over(self) -> None:
        self.models = self._wanted()
        self._catalog = {model_id: self._described(model_id) for model_id in self.models}

    def _described(self, model_id: str) -> Model:
        price = self.config.prices.get(model_id, self.config.price)
        return Model(
            model_id,
            Path(),
            created=self._since,
            owner=OWNER,
            settings=ModelSettings(price=price),
            recorded_digest=upstream_digest(model_id),
            remote=True,
        )

    def context(self, model_id: str) -> int:
        """Of a model here; 0 if it does not say."""
        return self._listed.get(self.models.get(model_id, ""), 0)

    # -- requests ----------------------------------------------------------------------------------

    def start(self, job: Job) -> LegAtUpstream:
        """See `gateway.backend.Backend`."""
        model = self.models.get(job.model.id, job.model.id)
        return LegAtUpstream(self, job, model, self._node_id)

    def leave_alone(self, seconds: float) -> None:
        """It has asked for that."""
        self._busy_until = time.monotonic() + seconds

    def fails_often(self) -> bool:
        """It says that it has failed on a request; whether it did so several times in a row: one
        may be the request's fault, and a client must not keep it from others with such."""
        self._failed_in_a_row += 1
        return self._failed_in_a_row >= _FAILS_OFTEN

    def served(self, leg: LegRecord) -> None:
        """A leg there has come to its end."""
        self._busy_until, self._failed_in_a_row = 0.0, 0
        if leg.ttft_ms is not None:
            self._ttft.append(max(0.0, leg.ttft_ms - leg.queue_ms))
        if (speed := leg.tokens_per_s) is not None:
            self._speed.append(speed)

    @property
    def busy_seconds(self) -> float:
        """For how long it wants to be left alone."""
        return max(0.0, self._busy_until - time.monotonic())

    @property
    def measured(self) -> bool:
        """Whether its speed is known from what it served."""
        return bool(self._ttft)

    @property
    def ttft_ms(self) -> float:
        return median(self._ttft or [_TTFT_MS])

    @property
    def tokens_per_s(self) -> float:
        return median(self._speed or [_TOKENS_PER_S])

    # -- health ------------------------------------------------------------------------------------

    async def look(self) -> bool:
        """Ask it which models it has and whether it is well; returns whether that has changed."""
        before = self.down, self._listed
        self.down = await self._why_down()
        self.looked.set()
        if self.down != before[0]:
            state = "can be used" if self.down is None else f"cannot be used: it {self.down}"
            log.log(logging.INFO if self.down is None else logging.WARNING, "upstream %s %s",
                    self.name, state)  # fmt: skip
        return (self.down, self._listed) != before

    async def _why_down(self) -> str | None:
        health = self.config.health
        why = await self._list_models()
        if health == "models":
            return why
        if health == "none":
            return None
        try:
            await self.client.check_health(_LOOK_SECONDS)
        except (ApiError, TimeoutError) as error:
            return _few_words(error)
        return None

    async def _list_models(self) -> str | None:
        """Returns why they cannot be listed; what was listed before stays then."""
        try:
            listed = _decode_models(await self.client.models(_LOOK_SECONDS)).data
        except (ApiError, TimeoutError) as error:
            return _few_words(error)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return "answers with no list of models"
        # Of a box: not what it has from upstreams itself, or two could serve each other nothing.
        own = [each for each in listed if each.owned_by != OWNER]
        self._listed = {each.id: each.context for each in own[:_MAX_MODELS]}
        self._take_over()
        return None

    async def close(self) -> None:
        """Once nothing runs there any more."""
        await self.places.idle()
        await self.client.aclose()


def _few_words(error: Exception) -> str:
    if not isinstance(error, ApiError):
        return f"says nothing for {_LOOK_SECONDS:g} s"
    _, _, rest = error.message.partition("The upstream ")
    return rest.partition(" ")[2].partition(":")[0] or error.message
