"""Commands of `pinaivu` in this process: the same output and exit status as in one of their own,
without the third of a second that Python takes to start and import."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pinaivu_box.cli.main import main
from tests.support import process_box
from tests.support.process_box import Box, environment

_one_at_a_time = threading.Lock()  # standard streams and environment are the whole process's


def run_command(
    *args: str,
    home: Path | None,
    check: bool = True,
    input: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `process_box.pinaivu`, which it is where the executable is tested."""
    if "PINAIVU_BINARY" in os.environ:
        return process_box.pinaivu(*args, home=home, check=check, input=input, env=env)
    argv = ["pinaivu", *args, *(["--home", str(home)] if home else [])]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    stdin = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
    with (
        _one_at_a_time,
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", stdin),
        patch.object(sys, "stdout", out),
        patch.object(sys, "stderr", err),
        patch.dict(os.environ, environment(**(env or {})), clear=True),
        ThreadPoolExecutor(1) as thread,  # without an event loop, where the test may have one
    ):
        status = thread.submit(_status_of_main).result(300)
    done = subprocess.CompletedProcess(argv, status, _text(out), _text(err))
    if check and status != 0:
        raise AssertionError(f"pinaivu {args} exited {status}: {done.stderr}")
    return done


def run_command_json(*args: str, home: Path) -> Any:
    return json.loads(run_command(*args, "--json", home=home).stdout)


def make_key(box: Box, *options: str) -> tuple[str, str]:
    """The secret and the id of a new key, with options of `keys create`."""
    made = run_command_json("keys", "create", *options, home=box.home)
    return made["key"], made["id"]


def _status_of_main() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()
