"""An engine process, seen from the parent: starts it, exchanges frames with it, notices its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pinaivu_box import child
from pinaivu_box.engine.messages import (
    NOTICE,
    Add,
    Cancel,
    Embed,
    EngineLoad,
    FromEngine,
    LoadFailed,
    LoadModel,
    Named,
    OutOfMemory,
    Output,
    PrefixesSaved,
    Prompt,
    Ready,
    Refused,
    SavePrefixes,
    StepFrame,
    ToEngine,
    Tokenize,
    Tokenized,
    encode,
)
from pinaivu_box.errors import BoxError, EngineLost
from pinaivu_box.gateway.frame_pipe import FramePipe, joined
from pinaivu_box.gateway.placement_plan import EngineKey, Start
from pinaivu_box.gateway.throughput import Throughput
from pinaivu_box.models.catalog import Model
from pinaivu_box.models.memory import cpu_ticks, resident
from pinaivu_box.models.names import printable

log = logging.getLogger("pinaivu.engine")

# What a request hears of its engine; None says that it is gone.
Item = Prompt | Refused | Output | Tokenized | None
_STOP_SECONDS = 5.0
_SAVE_SECONDS = 10.0
_MAX_LINE_CHARACTERS = 1000  # of what the child prints
_HUNG_SECONDS = 15.0  # with work, and neither a frame nor a tick of processor time


class StartFailed(BoxError):
    """The engine did not come up; the message says why.  `memory` is set if a device had too little
    memory."""

    def __init__(self, message: str, memory: OutOfMemory | None = None) -> None:
        super().__init__(message)
        self.memory = memory


class EngineProcess:
    """One engine process.  Each request that it has got has a receiver, which is called with what
    the engine says of it, while its frame is read.

    `number` tells it from every other process of this box, `replica` from those that have the same
    model."""

    _numbers = itertools.count(1)

    def __init__(
        self, model: Model, model_digest: str, load: LoadModel, replica: int, plan: Start
    ) -> None:
        self.number = next(self._numbers)
        self.model, self.model_id, self.replica = model, model.id, replica
        self.model_digest = model_digest
        self.plan = plan  # where it is, and why
        self.load = EngineLoad()
        self.throughput = Throughput()
        self.ready: Ready
        self.users = 0  # requests that hold it, also before they are sent
        self.idle_since = time.monotonic()
        # By tenant: when it last used it, and for how many seconds it then wanted to keep it.
        self.uses: dict[str, tuple[float, float | None]] = {}
        self.unloading: asyncio.TimerHandle | None = None
        self.to_unload = False  # once those who use it now have left
        self.interval = math.inf  # mean seconds between uses, of lately
        self.used_at = 0.0
        self.started_at = self.ready_at = time.monotonic()
        self.closed = asyncio.Event()
        self._saved = asyncio.Event()
        self._load_frame = load
        self._receivers: dict[str, Callable[[Item], None]] = {}
        self._messages = 0  # sent and received
        self.last_lines: deque[str] = deque(maxlen=20)  # that it has printed
        self._process: asyncio.subprocess.Process
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def key(self) -> EngineKey:
        return EngineKey(self.model_id, self.replica)

    @property
    def launched(self) -> bool:
        """Whether there is a process already."""
        return bool(self._tasks)

    @property
    def used(self) -> bool:
        """Whether a request has ever used it."""
        return self.used_at > 0

    @property
    def load_seconds(self) -> float:
        return self.ready_at - self.started_at

    @property
    def memory_by_device(self) -> Mapping[str, int]:
        """What it has taken; as was planned where it cannot tell."""
        taken = {each.device: each.total for each in self.ready.memory}
        return {**self.plan.layout.memory, **taken}

    def use(self) -> None:
        """Note one more user."""
        now = time.monotonic()
        if self.used:
            seconds = now - self.used_at
            first = self.interval == math.inf
            self.interval = seconds if first else 0.8 * self.interval + 0.2 * seconds
        self.used_at = now
        self.users += 1
        self.to_unload = False

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    @property
    def memory(self) -> int:
        """Resident bytes, the mapped model included."""
        return resident(self.pid)

    async def start(self, seconds: float) -> None:
        """Returns when the model is loaded.  Raises StartFailed."""
        if child.executable_replaced():
            # It need not have the model that we sign for.
            raise StartFailed("its executable was replaced since the box started; start it anew")
        loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        pipe = FramePipe(partial(self._take, loaded))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *child.command("engine"),
                stdin=asyncio.subprocess.PIPE,
                stdout=pipe.writer,
                stderr=asyncio.subprocess.PIPE,
            )
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(pipe.writer)
        self._tasks = [
            asyncio.create_task(self._notice_end(pipe, loaded)),
            asyncio.create_task(self._read_stderr()),
            asyncio.create_task(self._kill_if_hung()),
        ]
        self._send(self._load_frame)
        try:
            self.ready = await asyncio.wait_for(loaded, seconds)
            self.ready_at = time.monotonic()
        except TimeoutError:
            await self.stop()
            raise StartFailed(f"it was not ready after {seconds:g} seconds") from None
        except BaseException:
            await self.stop()
            raise

    def submit(self, message: Add | Embed | Tokenize, receive: Callable[[Item], None]) -> None:
        """Hand over a request; the one answer to a Tokenize is Tokenized or Refused.  `receive`
        raises nothing.  Raises EngineLost if the child is gone."""
        if not self.alive:
            raise EngineLost("The engine stopped before it could take the request; try again.")
        request_id = message.request.id if isinstance(message, Tokenize) else message.id
        self._receivers[request_id] = receive
        self._send(message)

    def name_prefixes(self, texts: Sequence[str]) -> None:
        """Beginnings of prompts that are shared from now on; see `engine.messages.Named`."""
        if self.alive:
            self._send(Named(list(texts)))

    def cancel(self, request_id: str) -> None:
        if self.alive and request_id in self._receivers:
            self._send(Cancel(request_id))

    def forget(self, request_id: str) -> None:
        self._receivers.pop(request_id, None)

    async def save_prefixes(self) -> None:
        """Have it save what its next engine can use; nobody uses it any more."""
        if self._load_frame.saved is None or not self.alive:
            return
        self._send(SavePrefixes())
        waits = [asyncio.create_task(each.wait()) for each in (self._saved, self.closed)]
        await asyncio.wait(waits, timeout=_SAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def stop(self) -> None:
        """Close its stdin, which ends it; kill it if it does not go."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            await self._kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _kill(self) -> None:
        """Kill it; one that a driver does not let go is left behind."""
        self._process.kill()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            log.error("the engine of %s cannot be killed", self.model_id)
            self.closed.set()
            self._tell_all_of_end()
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    # -- frames --------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        self._messages += 1
        if self._process.stdin and not self._process.stdin.is_closing():
            with contextlib.suppress(ConnectionError):  # its end is noticed when reading
                self._process.stdin.write(encode(message))

    async def _notice_end(self, pipe: FramePipe, loaded: asyncio.Future[Ready]) -> None:
        try:
            await pipe.ended
        except Exception:
            log.exception("unreadable frame from the engine of %s; stopping it", self.model_id)
            self._process.kill()
        finally:
            pipe.close()
        await self._process.wait()
        self._close(loaded)

    def _take(self, loaded: asyncio.Future[Ready], frames: Sequence[FromEngine]) -> None:
        self._messages += len(frames)
        for frame in joined(frames) if len(frames) > 1 else frames:
            if not isinstance(frame, StepFrame):
                self._handle(frame, loaded)
                continue
            self.load = frame.load
            self.throughput.note(frame.load.tokens_computed)
            if frame.prompts or frame.refused or frame.numbers or frame.replayed:
                self._take_beginnings_and_ends(frame)
            receiver_of = self._receivers.get
            for request_id, output in frame.outputs.items():
                if (receive := receiver_of(request_id)) is not None:
                    receive(output)

    def _take_beginnings_and_ends(self, frame: StepFrame) -> None:
        for request_id, prompt in frame.prompts.items():
            self._deliver(request_id, prompt)
        for refused in frame.refused:
            self._deliver(refused.id, refused)
        for request_id, numbers in frame.numbers.items():
            frame.outputs[request_id].numbers = numbers  # it has ended with that output
        for request_id, replayed in frame.replayed.items():
            frame.outputs[request_id].replayed = replayed

    def _handle(self, frame: FromEngine, loaded: asyncio.Future[Ready]) -> None:
        match frame:
            case Tokenized():
                self._deliver(frame.id, frame)
            case PrefixesSaved():
                self._saved.set()
            case Ready() if not loaded.done():
                loaded.set_result(frame)
            case LoadFailed() if not loaded.done():
                # It quotes llama.cpp, and that the file.
                why = f"the model could not be loaded: {printable(frame.message)}"
                loaded.set_exception(StartFailed(why, frame.memory))

    def _deliver(self, request_id: str, item: Item) -> None:
        receive = self._receivers.get(request_id)
        if receive is not None:
            receive(item)

    def _tell_all_of_end(self) -> None:
        receivers, self._receivers = self._receivers, {}
        for receive in receivers.values():
            receive(None)

    def _close(self, loaded: asyncio.Future[Ready]) -> None:
        self.closed.set()
        if not loaded.done():
            printed = self.last_lines[-1] if self.last_lines else "it printed nothing"
            code = self._process.returncode or 0
            how = f"crashed with signal {-code}" if code < 0 else f"ended with status {code}"
            loaded.set_exception(
                StartFailed(f"the model could not be loaded, the engine {how}: {printed}")
            )
        self._tell_all_of_end()

    async def _kill_if_hung(self) -> None:
        """A step may take long on a slow machine; but then it computes."""
        seen: tuple[int, int] | None = None
        while self.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.closed.wait(), _HUNG_SECONDS)
            ticks = cpu_ticks(self.pid)
            now = None if ticks is None or not self._receivers else (self._messages, ticks)
            if now is not None and now == seen:
                log.error("the engine of %s hangs; ending it", self.model_id)
                await self._kill()
            seen = now

    async def _read_stderr(self) -> None:
        stream = self._process.stderr
        while stream is not None and (line := await _line(stream)):
            text = printable(line.decode(errors="replace").rstrip(), _MAX_LINE_CHARACTERS)
            if text:
                self.last_lines.append(text)
                if text.startswith(NOTICE):
                    log.warning("%s: %s", self.model_id, text.removeprefix(NOTICE))
                else:
                    log.debug("%s: %s", self.model_id, text)


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # longer than the reader's limit: the reader has dropped it
        return b"(a line too long to keep)\n"
