"""The licence of a model: its name, and its text where that is known."""

from __future__ import annotations

from pathlib import Path

from pinaivu_box.models import bundled, known_models
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.names import printable

_TEXTS = Path(__file__).parent / "license_texts"  # FILE.txt holds the licence of that SPDX name
_MAX_NAME = 60  # characters


def name_of(model: Model) -> str:
    """Return the licence's name: as the list of known models has it, or the registry, or the file;
    "" if nobody says."""
    recorded = model.record.license if model.record is not None else ""
    return name_in(model.id, recorded) or model.header.license


def name_in(model_id: str, recorded: str) -> str:
    """Return the name of the licence that a registry has given for a model, as a text or a name."""
    known = known_models.known(model_id)
    return known.license if known is not None else _first_line(recorded)


def text_of(model: Model) -> str:
    """Return the licence's text: what came with the model, or what its name stands for; "" if the
    name is all that is known."""
    recorded = model.record.license if model.record is not None else ""
    if "\n" in recorded.strip():
        return recorded
    names = {recorded, name_of(model), model.header.license}
    if model.id == bundled.MODEL_ID and model.owner == "bundled":
        names.add("apache-2.0")
    for name in sorted(names):
        path = _TEXTS / f"{name.lower()}.txt"
        if path.parent == _TEXTS and path.is_file():
            return path.read_text()
    return ""


def _first_line(text: str) -> str:
    return printable(
        next((line.strip() for line in text.splitlines() if line.strip()), ""), _MAX_NAME
    )
