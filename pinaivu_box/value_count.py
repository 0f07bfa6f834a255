"""How many values a decoded document holds: what it costs to walk and convert it."""

from __future__ import annotations

from typing import Any


def exceeds(raw: Any, max_values: int, max_numbers: int, *, count_names: bool = False) -> bool:
    """Whether `raw` holds more than `max_numbers` numbers, or more than `max_values` other values;
    with `count_names` the names of an object's fields count as values."""
    values = numbers = 0
    rest = [raw]
    while rest:
        value = rest.pop()
        if isinstance(value, int | float):
            numbers += 1
        else:
            values += 1
        if values > max_values or numbers > max_numbers:
            return True
        if isinstance(value, dict):
            rest.extend(value.values())
            if count_names:
                values += len(value)
        elif isinstance(value, list):
            rest.extend(value)
    return False
