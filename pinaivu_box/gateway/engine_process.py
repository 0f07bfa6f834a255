"""An engine process, seen from the parent: starts it, exchanges frames with it, notices its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence

from pinaivu_box import child
from pinaivu_box.engine.messages import (
    LENGTH_BYTES,
    Add,
    Cancel,
    Embed,
    EngineLoad,
    FromEngine,
    LoadFailed,
    LoadModel,
    Named,
    Output,
    Prompt,
    Ready,
    Refused,
    StepFrame,
    ToEngine,
    Tokenize,
    Tokenized,
    body_length,
    decode_from_engine,
    encode,
)
from pinaivu_box.errors import BoxError, EngineLost
from pinaivu_box.gateway.mailbox import Mailbox
from pinaivu_box.models.memory import cpu_ticks, resident
from pinaivu_box.models.names import printable

log = logging.getLogger("pinaivu.engine")

# What a request's mailbox carries; None says that the engine is gone.
Item = Prompt | Refused | Output | Tokenized | None
_STOP_SECONDS = 5.0
_MAX_LINE_CHARACTERS = 1000  # of what the child prints
_HUNG_SECONDS = 15.0  # with work, and neither a frame nor a tick of processor time


class StartFailed(BoxError):
    """The engine did not come up; the message says why."""


class EngineProcess:
    """One engine process.  Each request that it has got has a mailbox."""

    def __init__(self, model_id: str, model_digest: str, load: LoadModel) -> None:
        self.model_id = model_id
        self.model_digest = model_digest
        self.load = EngineLoad()
        self.ready: Ready
        self.users = 0  # requests that hold it, also before they are sent
        self.idle_since = time.monotonic()
        # By tenant: when it last used it, and for how many seconds it then wanted to keep it.
        self.uses: dict[str, tuple[float, float | None]] = {}
        self.unloading: asyncio.TimerHandle | None = None
        self.started_at = time.monotonic()
        self.closed = asyncio.Event()
        self._load_frame = load
        self._mailboxes: dict[str, Mailbox[Item]] = {}
        self._messages = 0  # sent and received
        self.last_lines: deque[str] = deque(maxlen=20)  # that it has printed
        self._process: asyncio.subprocess.Process
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int:
        return self._process.pid

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
            # Another version's child need not understand us, nor have the model that we signed.
            raise StartFailed("its executable was replaced since the box started; start it anew")
        self._process = await asyncio.create_subprocess_exec(
            *child.command("engine"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._read_frames(loaded)),
            asyncio.create_task(self._read_stderr()),
            asyncio.create_task(self._kill_if_hung()),
        ]
        self._send(self._load_frame)
        try:
            self.ready = await asyncio.wait_for(loaded, seconds)
        except TimeoutError:
            await self.stop()
            raise StartFailed(f"it was not ready after {seconds:g} seconds") from None
        except BaseException:
            await self.stop()
            raise

    def submit(self, message: Add | Embed | Tokenize) -> Mailbox[Item]:
        """Hand over a request; the one answer to a Tokenize is Tokenized or Refused.  Raises
        EngineLost if the child is gone."""
        if not self.alive:
            raise EngineLost("The engine stopped before it could take the request; try again.")
        mailbox: Mailbox[Item] = Mailbox()
        self._mailboxes[message.request.id if isinstance(message, Tokenize) else message.id] = (
            mailbox
        )
        self._send(message)
        return mailbox

    def name_prefixes(self, texts: Sequence[str]) -> None:
        """Beginnings of prompts that are shared from now on; see `engine.messages.Named`."""
        if self.alive:
            self._send(Named(list(texts)))

    def cancel(self, request_id: str) -> None:
        if self.alive and request_id in self._mailboxes:
            self._send(Cancel(request_id))

    def forget(self, request_id: str) -> None:
        self._mailboxes.pop(request_id, None)

    async def stop(self) -> None:
        """Close its stdin, which ends it; kill it if it does not go."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- frames --------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        self._messages += 1
        if self._process.stdin and not self._process.stdin.is_closing():
            with contextlib.suppress(ConnectionError):  # its end is noticed when reading
                self._process.stdin.write(encode(message))

    async def _read_frames(self, loaded: asyncio.Future[Ready]) -> None:
        stream = self._process.stdout
        if stream is None:
            raise RuntimeError("the engine was started without a pipe")
        try:
            while True:
                header = await stream.readexactly(LENGTH_BYTES)
                self._handle(
                    decode_from_engine(await stream.readexactly(body_length(header))), loaded
                )
        except asyncio.IncompleteReadError:
            pass  # the child has ended
        except Exception:
            log.exception("unreadable frame from the engine of %s; stopping it", self.model_id)
            self._process.kill()
        await self._process.wait()
        self._close(loaded)

    def _handle(self, frame: FromEngine, loaded: asyncio.Future[Ready]) -> None:
        self._messages += 1
        match frame:
            case StepFrame():
                self.load = frame.load
                for request_id, prompt in frame.prompts.items():
                    self._deliver(request_id, prompt)
                for refused in frame.refused:
                    self._deliver(refused.id, refused)
                for request_id, output in frame.outputs.items():
                    self._deliver(request_id, output)
            case Tokenized():
                self._deliver(frame.id, frame)
            case Ready() if not loaded.done():
                loaded.set_result(frame)
            case LoadFailed() if not loaded.done():
                # It quotes llama.cpp, and that the file.
                why = printable(frame.message)
                loaded.set_exception(StartFailed(f"the model could not be loaded: {why}"))

    def _deliver(self, request_id: str, item: Item) -> None:
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None:
            mailbox.put(item)

    def _close(self, loaded: asyncio.Future[Ready]) -> None:
        self.closed.set()
        if not loaded.done():
            printed = self.last_lines[-1] if self.last_lines else "it printed nothing"
            code = self._process.returncode or 0
            how = f"crashed with signal {-code}" if code < 0 else f"ended with status {code}"
            loaded.set_exception(
                StartFailed(f"the model could not be loaded, the engine {how}: {printed}")
            )
        for mailbox in self._mailboxes.values():
            mailbox.put(None)
        self._mailboxes.clear()

    async def _kill_if_hung(self) -> None:
        """A step may take long on a slow machine; but then it computes."""
        seen: tuple[int, int] | None = None
        while self.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.closed.wait(), _HUNG_SECONDS)
            ticks = cpu_ticks(self.pid)
            now = None if ticks is None or not self._mailboxes else (self._messages, ticks)
            if now is not None and now == seen:
                log.error("the engine of %s hangs; ending it", self.model_id)
                self._process.kill()
            seen = now

    async def _read_stderr(self) -> None:
        stream = self._process.stderr
        while stream is not None and (line := await _line(stream)):
            text = printable(line.decode(errors="replace").rstrip(), _MAX_LINE_CHARACTERS)
            if text:
                self.last_lines.append(text)
                log.debug("%s: %s", self.model_id, text)


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # longer than the reader's limit: the reader has dropped it
        return b"(a line too long to keep)\n"
