"""A process of its own with the backends that its environment gives: what they are, and what a
model says on them.

    python -m tests.support.backend_probe                    the backends
    python -m tests.support.backend_probe CONTEXT [MODEL]    and eight tokens of a model
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

TOKENS = 8
PROMPT = "The capital of France is"


def probe(
    env: dict[str, str], context: int | None = None, model: Path | None = None
) -> dict[str, Any]:
    """What the process printed, with its return code and what it wrote to standard error.  The
    model is the bundled one if none is given."""
    arguments = [] if context is None else [str(context), *([str(model)] if model else [])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.backend_probe", *arguments],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout) if done.stdout else {}
    return {**found, "code": done.returncode, "stderr": done.stderr}


def main(arguments: list[str]) -> None:
    import llama_cpp.llama_cpp as llama

    from pinaivu_box.engine import backends
    from pinaivu_box.errors import BoxError

    ggml, package = llama._lib, Path(llama.__file__).parent / "lib"
    found: dict[str, Any] = {}
    if arguments:
        try:
            found |= _greedy(int(arguments[0]), *map(Path, arguments[1:]))
        except BoxError as error:
            found["error"] = error.message
    found["backends"] = [
        {
            "name": one.name,
            "path": str(one.path),
            "devices": one.devices,
            "problem": one.problem,
            "missing": one.missing,
            "stand_ins": list(one.stand_ins),
        }
        for one in backends.load(ggml, package)
    ]
    print(json.dumps(found))


def _greedy(context: int, model: Path | None = None) -> dict[str, Any]:
    """The tokens, and what computed them."""
    from pinaivu_box.engine.runner import Batch
    from tests.support.real_runner import real_runner

    runner = real_runner(model, context=context, kv_tokens=context, max_sequences=1)
    made: list[int] = []
    position, batch = 0, runner.tokenize(PROMPT)
    while len(made) < TOKENS:
        places = range(position, position + len(batch))
        last = [0] * (len(batch) - 1) + [1]
        logits = runner.decode(Batch.of(batch, places, [0] * len(batch), last))
        position += len(batch)
        batch = [int(logits[-1].argmax())]
        made += batch
    return {"tokens": made, "device": runner.facts.device}


if __name__ == "__main__":
    main(sys.argv[1:])
