"""The prices of a model."""

from __future__ import annotations

from pinaivu_box import amount
from pinaivu_box.amount import Prices
from pinaivu_box.config import PricingConfig
from pinaivu_box.models.catalog import Model


def prices_of(model: Model, pricing: PricingConfig) -> Prices:
    """The prices of 1,000 tokens: the model's own, those that follow from the number of its active
    parameters, or those of all models."""
    own = model.settings.price or pricing.models.get(model.id)
    if own:
        return amount.prices(own)
    if pricing.per_billion and model.header.active_parameters:
        return amount.per_parameters(pricing.per_billion, model.header.active_parameters)
    return amount.prices(pricing.per_1k_tokens)
