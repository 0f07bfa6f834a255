"""What this box offers its peers: the models whose digests are known, and those of upstreams that
peers may use, with load and prices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from msgspec.structs import asdict

from pinaivu_box import __version__
from pinaivu_box.gateway.placement import Digest
from pinaivu_box.gossip.adverts import MAX_MODELS, Facts, Offer
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.prices import prices_of
from pinaivu_box.receipts.receipt import upstream_digest
from pinaivu_box.routing.load import LoadTracker
from pinaivu_box.settings import LiveSettings
from pinaivu_box.upstream.upstream import Upstream
from pinaivu_box.upstream.upstreams import Upstreams

_LOOK_SECONDS = 5.0

_File = tuple[str, Path, int, int]  # a model's id, and its file as it was when we read it


class Offers:
    """`keep_learning` finds the digests, which can take a minute for a large file that is seen for
    the first time; until then a model is not offered."""

    def __init__(
        self,
        settings: LiveSettings,
        load: LoadTracker,
        digest: Digest,
        draining: Callable[[], bool],
        upstreams: Upstreams,
    ) -> None:
        self._upstreams = upstreams
        self._settings, self._load, self._digest = settings, load, digest
        self._draining = draining
        self._digests: dict[_File, bytes] = {}

    async def keep_learning(self, changed: Callable[[], None]) -> None:
        """Until cancelled; the catalog may be another after a reload."""
        while True:
            # Large files last: nobody waits for what is behind them.
            for model in sorted(self._settings.catalog.models, key=lambda model: model.size):
                if _file(model) not in self._digests:
                    with suppress(OSError):  # it is gone, and whoever asks for it will hear that
                        self._digests[_file(model)] = bytes.fromhex(await self._digest(model))
                        changed()
            await asyncio.sleep(_LOOK_SECONDS)

    def describe(self) -> Facts:
        config, catalog = self._settings.config, self._settings.catalog
        models = [model for model in catalog.models if _file(model) in self._digests]
        offers = [*map(self._offer, models), *self._of_upstreams()]
        return Facts(
            version=__version__[:32],
            addresses=(),
            currency=config.pricing.currency[:16],
            models=tuple(offers[:MAX_MODELS]),
            draining=self._draining(),
            cpu_variant=(config.engine.cpu_variant or self._load.cpu_variant())[:64],
        )

    def _offer(self, model: Model) -> Offer:
        load, config = self._load, self._settings.config
        price = prices_of(model, config.pricing)
        return Offer(
            id=model.id,
            digest=self._digests[_file(model)],
            sequences=load.places(model.id),
            **asdict(load.of(model.id)),
            ttft_ms=math.ceil(load.ttft_ms(model)),
            tokens_per_s=round(load.tokens_per_s(model.id)),
            prices=(price.prompt, price.cached or price.prompt, price.completion),
        )

    def _of_upstreams(self) -> Iterator[Offer]:
        """Not those that are here as well: an advert has one model of each name."""
        names = {model.id for model in self._settings.catalog.models}
        for upstream in self._upstreams.all:
            if not upstream.config.for_peers or upstream.down is not None:
                continue
            for model_id in upstream.models:
                if model_id not in names:
                    names.add(model_id)
                    yield self._offer_of(upstream, upstream.model(model_id))

    def _offer_of(self, upstream: Upstream, model: Model) -> Offer:
        price, places = prices_of(model, self._settings.config.pricing), upstream.places
        return Offer(
            id=model.id,
            digest=bytes.fromhex(upstream_digest(model.id)),
            sequences=places.limit,
            sequences_free=places.free,
            kv_free=2**20,
            queue=places.waiting,
            ttft_ms=math.ceil(upstream.ttft_ms),
            tokens_per_s=round(upstream.tokens_per_s),
            prices=(price.prompt, price.cached or price.prompt, price.completion),
        )


def _file(model: Model) -> _File:
    return model.id, model.path, model.size, model.created
