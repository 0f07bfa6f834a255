"""The engine as a child process: frames over its pipes, and when it ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pytest

from pinaivu_box.engine.fake_runner import SENTENCE
from pinaivu_box.engine.messages import (
    Cancel,
    Constraint,
    FromEngine,
    LoadFailed,
    LoadModel,
    Ready,
    StepFrame,
    ToEngine,
    decode_from_engine,
    encode,
    read_body,
)
from tests.support import gguf_files
from tests.support.engine_harness import Heard, add, load
from tests.support.process_box import cpu_seconds

PATIENCE = 120  # seconds until a test gives up; nothing is measured


class Child:
    """`python -m pinaivu_box engine`, as the box starts it."""

    def __init__(self, given_load: LoadModel | None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pinaivu_box", "engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert isinstance(self.process.stdout, io.BufferedReader)
        self.output: BinaryIO = self.process.stdout
        if given_load is not None:
            self.send(given_load)

    def send(self, *messages: ToEngine) -> None:
        assert self.process.stdin
        for message in messages:
            self.process.stdin.write(encode(message))
        self.process.stdin.flush()

    def read(self) -> FromEngine | None:
        """The next frame, None at the end."""
        body = read_body(self.output)
        return None if body is None else decode_from_engine(body)

    def ready(self) -> Ready:
        frame = self.read()
        assert isinstance(frame, Ready)
        return frame

    def listen(self, until: int) -> tuple[Heard, list[StepFrame]]:
        """Until so many requests have ended, or were refused."""
        heard, frames = Heard(), []
        while len(heard.ends) + len(heard.refused) < until:
            frame = self.read()
            assert isinstance(frame, StepFrame)
            heard.take(frame)
            frames.append(frame)
        return heard, frames

    def hang_up(self) -> int:
        """Close its stdin; returns its status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Those that a test has started: ended with it."""
    made: list[Child] = []
    yield made
    for child in made:
        child.end()


def start(children: list[Child], given_load: LoadModel | None) -> Child:
    children.append(Child(given_load))
    return children[-1]


def fake(milliseconds: int = 1, **sizes: int) -> LoadModel:
    """Without drafts: a step gives each request one token."""
    sizes = {"context": 4000, "kv_tokens": 64_000, **sizes}
    return load(f"fake:{milliseconds}", drafting=False, **sizes)


# -- how it ends -----------------------------------------------------------------------------------


def test_closing_stdin_before_anything_was_sent_ends_it(children: list[Child]) -> None:
    assert start(children, None).hang_up() == 0


def test_closing_stdin_while_it_loads_ends_it(children: list[Child], tmp_path: Path) -> None:
    """Loading is C code, here one that waits for ever: for what comes through a fifo."""
    model = tmp_path / "model.gguf"
    os.mkfifo(model)
    child = start(children, load(str(model)))
    deadline = time.monotonic() + PATIENCE
    while True:
        try:  # succeeds when the child has opened it for reading
            writer = os.open(model, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert time.monotonic() < deadline and child.process.poll() is None
            time.sleep(0.02)
    try:
        assert child.hang_up() == 0
    finally:
        os.close(writer)


def test_closing_stdin_while_it_runs_ends_it(children: list[Child]) -> None:
    child = start(children, fake())
    child.ready()
    child.send(*(add(f"r{n}", max_tokens=3000) for n in range(4)))
    frame = child.read()
    while not (isinstance(frame, StepFrame) and frame.outputs):
        frame = child.read()
    assert child.hang_up() == 0


def test_closing_stdin_while_it_is_idle_ends_it(children: list[Child]) -> None:
    child = start(children, fake())
    child.ready()
    assert child.hang_up() == 0


def test_closing_stdin_while_nobody_reads_ends_it(children: list[Child]) -> None:
    """Its writer stands before a full pipe then."""
    child = start(children, fake())
    child.ready()
    fill_pipe(child)
    assert child.hang_up() == 0


def test_a_reader_that_goes_away_ends_it(children: list[Child]) -> None:
    child = start(children, fake())
    child.ready()
    child.send(add(max_tokens=3000))
    assert child.process.stdout
    child.process.stdout.close()
    assert child.process.wait(PATIENCE) == 0


def test_ctrl_c_is_the_parents_business(children: list[Child]) -> None:
    child = start(children, fake())
    child.ready()
    child.process.send_signal(signal.SIGINT)
    child.send(add(max_tokens=5))
    heard, _ = child.listen(1)
    assert heard.ends == {"r": "length"}


def test_a_file_that_is_no_model_says_so_and_ends(children: list[Child], tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"no model" * 100)
    child = start(children, load(str(model)))
    frame = child.read()
    assert isinstance(frame, LoadFailed) and "model.gguf" in frame.message
    assert child.read() is None
    assert child.process.wait(PATIENCE) == 0


def test_the_error_of_a_file_that_llama_cpp_refuses_says_why(
    children: list[Child], tmp_path: Path
) -> None:
    """What the reader lets pass, as it does not know what a model of that architecture needs."""
    real, model = gguf_files.Real.read(), tmp_path / "model.gguf"
    model.write_bytes(real.written(real.keys, real.tensors[:5]))
    child = start(children, load(str(model)))
    frame = child.read()
    assert isinstance(frame, LoadFailed) and "attn_q.weight" in frame.message
    assert child.read() is None
    assert child.process.wait(PATIENCE) == 0


# -- frames ----------------------------------------------------------------------------------------


def test_a_child_serves_its_requests(children: list[Child]) -> None:
    child = start(children, fake(max_sequences=4))
    assert child.ready().max_sequences == 4
    child.send(*(add(f"r{n}", "x" * n, max_tokens=20 + n) for n in range(8)))
    heard, _ = child.listen(8)
    for n in range(8):
        at = len(heard.prompts[f"r{n}"]) - 1
        assert heard.text[f"r{n}"] == (SENTENCE * 9)[at : at + 20 + n].decode()
    assert set(heard.ends.values()) == {"length"}


def test_cancels_and_stop_strings_end_requests_of_a_child(children: list[Child]) -> None:
    child = start(children, fake())
    child.ready()
    child.send(
        add("stops", max_tokens=3000, stop=["lazy"]),
        add("cancelled", max_tokens=3000),
    )
    heard, asked = Heard(), False
    while len(heard.ends) < 3:
        frame = child.read()
        assert isinstance(frame, StepFrame)
        heard.take(frame)
        if not asked and "cancelled" in heard.prompts:
            asked = True
            child.send(Cancel("cancelled"), add("ends", max_tokens=200))
    assert heard.ends == {"stops": "stop", "cancelled": "cancelled", "ends": "length"}
    assert heard.text["stops"].endswith("the ")
    while heard.load.running or heard.load.waiting:  # of a stop string the engine hears later
        frame = child.read()
        assert isinstance(frame, StepFrame)
        heard.take(frame)


def test_a_request_is_cancelled_while_its_grammar_compiles(children: list[Child]) -> None:
    """However far that is: what comes after is served, and both are heard of."""
    child = start(children, fake())
    child.ready()
    pattern = {"type": "string", "pattern": "[a-z]{1,50}@[a-z]{1,200}"}
    schema = {"type": "object", "properties": {f"p{n}": pattern for n in range(500)}}
    large = Constraint("json_schema", json.dumps(schema))
    child.send(
        add("large", max_tokens=3000, constraint=large),
        Cancel("large"),
        add("plain", max_tokens=5),
        add("refused", constraint=Constraint("json_schema", '{"not": {}}')),
    )
    heard, _ = child.listen(3)
    assert "large" in heard.refused or heard.ends["large"] == "cancelled"  # as far as it had come
    assert heard.ends["plain"] == "length"
    assert heard.refused["refused"].code == "invalid_body"


# -- a slow reader ---------------------------------------------------------------------------------


def waiting_bytes(child: Child) -> int:
    assert child.process.stdout
    found = fcntl.ioctl(child.process.stdout.fileno(), termios.FIONREAD, b"\0" * 4)
    return int(struct.unpack("i", found)[0])


def fill_pipe(child: Child, tokens: int = 3000) -> None:
    """Ask for much and read nothing, until no more fits into the pipe."""
    assert child.process.stdout
    size = fcntl.fcntl(child.process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    child.send(*(add(f"r{n}", max_tokens=tokens) for n in range(4)))
    deadline = time.monotonic() + PATIENCE
    while waiting_bytes(child) < size - 1024:
        assert time.monotonic() < deadline and child.process.poll() is None
        time.sleep(0.01)


def test_a_slow_reader_gets_fewer_and_larger_frames(children: list[Child]) -> None:
    """The steps go on while it does not read: one frame holds what many of them said."""
    child = start(children, fake())
    child.ready()
    fill_pipe(child, tokens=600)
    time.sleep(1.5)  # steps of a millisecond; at least some of them are made
    heard, frames = child.listen(4)
    assert all(len(tokens) == 600 for tokens in heard.tokens.values())
    at = len(heard.prompts["r0"]) - 1
    assert heard.text["r0"] == (SENTENCE * 20)[at : at + 600].decode()
    largest = max(frames, key=lambda frame: sum(len(new.tokens) for new in frame.outputs.values()))
    assert min(len(new.tokens) for new in largest.outputs.values()) > 20
    # A step's worth a frame would be as many frames as steps.
    steps = frames[-1].load.steps
    assert steps >= 600 and len(frames) < steps - 20
    jumps = [b.load.steps - a.load.steps for a, b in pairwise(frames)]
    assert max(jumps) > 20


def test_a_reader_that_stops_for_good_does_not_stop_the_steps(children: list[Child]) -> None:
    """All is computed behind a full pipe; whoever reads at last gets the whole in one frame."""
    child = start(children, fake(0))
    child.ready()
    fill_pipe(child, tokens=3000)  # far more than the pipe holds, in however few frames
    seen = [-1.0]
    while len(seen) < 4 or len(set(seen[-4:])) > 1:  # idle at last: all steps are made
        time.sleep(0.5)
        seen.append(cpu_seconds(child.process.pid))
    heard, frames = child.listen(4)
    assert all(len(tokens) == 3000 for tokens in heard.tokens.values())
    assert frames[-1].load.steps - frames[-2].load.steps > 20


def test_a_stop_string_ends_a_sequence_behind_a_slow_reader(children: list[Child]) -> None:
    """The text is looked at when the frame is written: what was said after it is cut off."""
    child = start(children, fake())
    child.ready()
    fill_pipe(child, tokens=600)
    child.send(add("stops", max_tokens=3000, stop=["lazy"]))
    heard, _ = child.listen(5)
    assert heard.ends["stops"] == "stop" and heard.text["stops"].endswith("the ")
