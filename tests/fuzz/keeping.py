"""Asks for answers that keep to schemas, many at once, and checks them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai

from tests.fuzz.schemas import make_schema
from tests.support.process_box import MODEL, Box


def keep(box: Box, schemas: Iterable[int], seeds: Iterable[int]) -> tuple[int, int, list[str]]:
    """How many answers validate, how many schemas are refused, and what does not validate."""
    client = box.client.with_options(timeout=900)
    pairs = [(schema, seed) for schema in schemas for seed in seeds]

    def ask(pair: tuple[int, int]) -> str:
        number, seed = pair
        schema = make_schema(number)
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        try:
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Make up an example, number {seed}."}],
                response_format=form,
                temperature=1,
                seed=seed,
                max_tokens=1500,
            )
        except openai.UnprocessableEntityError:
            return "refused"
        text = answer.choices[0].message.content or ""
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"schema {number}, seed {seed}: {str(error)[:200]}: {text[:300]}"
        return ""

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(ask, pairs))
    broken = [one for one in found if one not in ("", "refused")]
    return found.count(""), found.count("refused"), broken
