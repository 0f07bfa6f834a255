"""Programs that people run against a box, as they would, but without a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.page import MODEL, fenced
from tests.clients.script import CODEX_MODELS, DONE, TASK, TEXT
from tests.support.process_box import wait_until

SECONDS = 600
HERE = Path(__file__).parent
# Nothing but the box is to be asked.
QUIET = {
    "AIDER_ANALYTICS_DISABLE": "true",
    "AIDER_CHECK_UPDATE": "false",
    "AIDER_SHOW_RELEASE_NOTES": "false",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CONTINUE_TELEMETRY_ENABLED": "0",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "NO_PROXY": "*",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
}


class Failed(Exception):
    """The program did not do what it should."""


@dataclass(frozen=True)
class Session:
    """A program in an empty `folder` with an empty `home`, and a box at `url`."""

    title: str
    installed: Path
    folder: Path
    home: Path
    url: str
    key: str

    def fenced(self, language: str) -> str:
        """Of the program's section in docs/clients.md."""
        return fenced(self.title, language, self.url, self.key)

    def run(self, *command: str | Path, **more: str) -> str:
        """What it printed.  Raises Failed."""
        with self.started(*command, **more) as process:
            try:
                printed, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                raise Failed(f"{command[0]} takes more than {SECONDS} s") from None
        if process.returncode != 0:
            raise Failed(f"{command[0]} exited {process.returncode}: {printed[-4000:]}")
        return printed

    @contextlib.contextmanager
    def started(self, *command: str | Path, **more: str) -> Iterator[subprocess.Popen[str]]:
        """With its children it ends when the block does."""
        node = self.installed / "node_modules"
        found = [self.installed / "bin", node / "node/bin", node / ".bin"]
        path = os.pathsep.join([*map(str, found), os.environ["PATH"]])
        (self.home / "tmp").mkdir(exist_ok=True)
        places = {"HOME": str(self.home), "TMPDIR": str(self.home / "tmp"), "PATH": path}
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env={**places, **QUIET, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def shell(self, say: str = "", **options: str) -> str:
        """Run the `sh` block of the section; `options` of programs are put behind their names."""
        text = self.fenced("sh").replace("Say hello.", say)
        for name, more in options.items():
            text = text.replace(f"{name} ", f"{name} {more} ", 1)
        return self.run("sh", "-ec", text)


@dataclass(frozen=True)
class Program:
    """`pins` are packages of PyPI (`name==version`) or npm (`name@version`), the first of them the
    program itself.  `drive` runs it, and raises Failed."""

    title: str
    pins: Sequence[str]
    drive: Callable[[Session], None]

    @property
    def version(self) -> str:
        return self.pins[0].rpartition("@")[2].rpartition("==")[2]

    def install(self, name: str, cache: Path) -> Path:
        """The folder with its packages, in `cache`; made elsewhere, so that it is there whole."""
        folder = cache / f"{name}-{self.version}"
        wanted = "\n".join(self.pins)
        if (folder / "pins").is_file() and (folder / "pins").read_text() == wanted:
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            if "==" in wanted:
                pip = [
                    str(made / "bin/python"),
                    "-m",
                    "pip",
                    "install",
                    "--disable-pip-version-check",
                ]
                _run(["python3", "-m", "venv", made])
                _run([*pip, *self.pins])
                for script in (made / "bin").iterdir():  # whose first line names the folder
                    if script.is_file() and script.read_bytes().startswith(b"#!" + bytes(made)):
                        script.write_text(script.read_text().replace(str(made), str(folder), 1))
            else:
                npm = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(made)]
                _run([*npm, *self.pins])
            (made / "pins").write_text(wanted)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        return folder


def _run(command: Sequence[str | Path]) -> None:
    """Raises Failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))} failed: {done.stderr[-4000:]}")


# -- what each does --------------------------------------------------------------------------------


def _check_file(session: Session, printed: str) -> None:
    made = session.folder / "made.txt"
    if not made.is_file() or made.read_text() != TEXT:
        raise Failed(f"made.txt was not written; it printed: {printed[-4000:]}")


def _check(session: Session, printed: str) -> None:
    _check_file(session, printed)
    if DONE not in printed:
        raise Failed(f"the answer after the last call was not shown; it printed: {printed[-4000:]}")


def _task(session: Session) -> str:
    return TASK.format(program=session.title)


def _claude_code(session: Session) -> None:
    _check(session, session.shell(_task(session), claude="--allowedTools=Write,Bash"))


def _codex(session: Session) -> None:
    """As a model that it does not know, then with what it says of two of its own: the first has a
    custom tool to patch with, the second writes programs that call tools."""
    home = session.home / ".codex"
    home.mkdir()
    (home / "config.toml").write_text(session.fenced("toml"))
    # Its own sandbox needs what a container forbids.
    options = "--dangerously-bypass-approvals-and-sandbox"
    _check(session, session.shell(_task(session), exec=options))
    session.run("sh", "-ec", f"codex debug models --bundled > {home}/known.json")
    known = {one["slug"]: one for one in json.loads((home / "known.json").read_text())["models"]}
    for name in CODEX_MODELS:
        (session.folder / "made.txt").unlink()
        catalog = {"models": [{**known[name], "slug": MODEL}]}
        (home / "models.json").write_text(json.dumps(catalog))
        more = f"{options} -c model_catalog_json={home}/models.json"
        _check(session, session.shell(TASK.format(program=name), exec=more))


def _opencode(session: Session) -> None:
    (session.folder / "opencode.json").write_text(session.fenced("json"))
    _check(session, session.shell(_task(session)))


def _continue(session: Session) -> None:
    (session.folder / "config.yaml").write_text(session.fenced("yaml"))
    _check(session, session.shell(_task(session), cn="--allow Write --allow Bash"))


def _aider(session: Session) -> None:
    prices = session.home / ".aider/caches/model_prices_and_context_window.json"
    prices.parent.mkdir(parents=True)
    prices.write_text("{}")  # which it would fetch
    for command in ("init", "config user.name A", "config user.email a@example.org"):
        session.run("git", *command.split())
    printed = session.shell(_task(session))
    _check_file(session, printed)
    if "Add made.txt" not in session.run("git", "log"):
        raise Failed(f"nothing was committed; it printed: {printed[-4000:]}")


def _ai_sdk(session: Session) -> None:
    script = session.folder / "box.mjs"
    script.write_text(session.fenced("js"))
    (session.folder / "node_modules").symlink_to(session.installed / "node_modules")
    printed = session.run("node", script)
    if printed.count("Three days of rain.\n") != 8 or printed.count("1 2 3\n") != 4:
        raise Failed(f"it printed: {printed}")


def _langchain(session: Session) -> None:
    shutil.copy(HERE / "langchain_standard.py", session.folder / "test_standard.py")
    # Its clients keep connections, which end with the event loop that they were made in.
    options = ("asyncio_mode=auto", "asyncio_default_test_loop_scope=session")
    printed = session.run(
        session.installed / "bin/python", "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider",
        *(word for option in options for word in ("-o", option)), "test_standard.py",
        BOX_URL=session.url, BOX_KEY=session.key,
    )  # fmt: skip
    print(printed.rstrip().rpartition("\n")[2])


def _litellm(session: Session) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (session.folder / "config.yaml").write_text(session.fenced("yaml"))
    options = ("--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port))
    key = {"LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(32)}"}
    with session.started(session.installed / "bin/litellm", *options, **key) as proxy:

        def ready() -> bool:
            if proxy.poll() is not None:
                raise Failed(f"the proxy ended: {proxy.communicate()[0][-4000:]}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        wait_until(ready, "LiteLLM's proxy", SECONDS)
        text = session.fenced("python").replace(":4000", f":{port}")
        for name in ("box", "box-responses", "box-messages"):
            again = text.replace('name = "box"', f'name = "{name}"')
            printed = session.run(session.installed / "bin/python", "-c", again, **key)
            if printed.count("Hello!\n") != 2 or "Three days of rain.\n" not in printed:
                raise Failed(f"over {name} it printed: {printed}")


def _cliborg(session: Session) -> None:
    printed = session.shell("Say hello.")
    if "Answer: Hello!" not in printed:
        raise Failed(f"it printed: {printed}")


PROGRAMS = {
    "claude-code": Program("Claude Code", ["@anthropic-ai/claude-code@2.1.328"], _claude_code),
    "codex": Program("Codex", ["@openai/codex@0.169.0"], _codex),
    "opencode": Program("opencode", ["opencode-ai@1.18.33"], _opencode),
    "continue": Program("Continue", ["@continuedev/cli@1.5.47"], _continue),
    "aider": Program("aider", ["aider-chat==0.86.2"], _aider),
    "ai-sdk": Program(
        "Vercel AI SDK",
        [
            "ai@7.0.173",
            "@ai-sdk/openai-compatible@3.0.92",
            "@ai-sdk/openai@4.0.118",
            "@ai-sdk/anthropic@4.0.105",
            "zod@4.6.7",
            "node@22.23.3",  # which it needs
        ],
        _ai_sdk,
    ),
    "langchain": Program(
        "LangChain",
        ["langchain-tests==1.1.9", "langchain-openai==1.7.4", "langchain-anthropic==1.7.10"],
        _langchain,
    ),
    "cliborg": Program("cliborg", ["cliborg==0.1.2", "ollama==0.6.3"], _cliborg),
    # Later ones want a package that is not to be had: `litellm-proxy`.
    "litellm": Program("LiteLLM proxy", ["litellm[proxy]==1.106.12"], _litellm),
}
