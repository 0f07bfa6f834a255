"""Imports go one way only, and what must stay light does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.package_modules import MODULES, ONLY_IN, PACKAGE, in_engine

ROOT = Path(__file__).parent.parent
# A module may import from its own room and from those before it.  The package itself (its version)
# is everybody's; __main__ stands behind all.
ROOMS = (
    "errors",
    "backoff",
    "bounded",
    "changes",
    "tasks",
    "idle_time",
    "startup",
    "heap",
    "appended",
    "text",
    "value_count",
    "http_body",
    "child",
    "fair_threads",
    "sandbox",
    "processors",
    "chat_format",
    "vector_format",
    "amount",
    "engine.messages",
    "engine_query",
    "nvml",
    "graphics_cards",
    "devices",
    "config_section",
    "server_config",
    "login_config",
    "tracing_config",
    "peering_config",
    "upstream_config",
    "config",
    "policy",
    "policy_bounds",
    "identity",
    "log",
    "systemd",
    "terminal_log",
    "logs",
    "openai",
    "models",
    "release",
    "update",
    "secret",
    "tracing_headers",
    "tls",
    "settings",
    "tracing",
    "receipts",
    "store",
    "login",
    "chats",
    "backup.sealed",
    "backup.archive",
    "backup.make",
    "backup.before_migration",
    "home",
    "receipt_log",
    "transport",
    "membership",
    "gossip",
    "network",
    "gateway",
    "upstream",
    "routing",
    "ledger",
    "files",
    "witness",
    "registry",
    "legs",
    "audits",
    "admin",
    "incidents",
    "box_metrics",
    "box",
    "box_services",
    "model_admin",
    "backup",
    "server",
    "doctor",
    "bench",
    "cli",
    "__main__",
)
WORKER = "engine.worker"
# What the engine may import beside itself.
OF_BOTH_SIDES = (
    "errors",
    "appended",
    "backoff",
    "bounded",
    "text",
    "fair_threads",
    "sandbox",
    "startup",
    "processors",
    "chat_format",
    "vector_format",
)
# Who starts the child may name its main; nobody else sees the engine but for its messages.
STARTS_THE_WORKER = "__main__"


def imports(source: str, module: str) -> set[str]:
    """Full names that a module imports, anywhere in it, also those it imports by a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = f"{PACKAGE}.{module}".split(".")[: -node.level]
                base = ".".join([*above, base] if base else above)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", node.value)
        ):
            found.add(node.value.partition(":")[0])
    return found


def own(name: str) -> str | None:
    """The module of ours that a full name is in (`pinaivu_box.errors.CliError` -> `errors`)."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 0, -1):
        if (module := ".".join(parts[1:end])) in MODULES:
            return module
    raise AssertionError(f"{name} is no module of ours")


def room_of(module: str) -> int:
    """The number of a module's room; a module without a room is a mistake of this file."""
    for number, room in enumerate(ROOMS):
        if module == room or module.startswith(room + "."):
            return number
    raise AssertionError(f"{module} is in no room: give it one in ROOMS")


def violations(module: str, source: str) -> list[str]:
    """What is wrong with a module's imports, in words."""
    wrong = []
    names = imports(source, module)
    for library, allowed_in in ONLY_IN.items():
        used = any(name.split(".")[0] == library for name in names)
        if used and not module.startswith(allowed_in):
            wrong.append(f"{module} imports {library}")
    for target in sorted({found for name in names if (found := own(name)) is not None}):
        if target == "":
            continue
        if in_engine(module) or module == "engine.messages":
            allowed = target in OF_BOTH_SIDES or target.split(".")[0] == "engine"
        elif in_engine(target):
            allowed = (module, target) == (STARTS_THE_WORKER, WORKER)
        elif module == "":
            allowed = False
        else:
            allowed = target == "engine" or room_of(target) <= room_of(module)
        if not allowed:
            wrong.append(f"{module or PACKAGE} imports {target}")
    return wrong


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or PACKAGE)
def test_a_module_imports_only_from_its_room_and_those_above(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    parents = [name for name in MODULES if name.split(".")[0] not in ("", "engine")]
    used = {room_of(module) for module in [*parents, "engine.messages"]}
    assert used == set(range(len(ROOMS)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("store.keys", "from pinaivu_box.gateway.metering import Meter"),
        ("config", "def f():\n    from pinaivu_box import box"),
        ("gateway.local", "import pinaivu_box.engine.scheduler"),
        ("gateway.local", "from pinaivu_box.engine import scheduler"),
        ("gateway.local", "import importlib\nimportlib.import_module('pinaivu_box.cli.serve')"),
        ("cli.serve", "from pinaivu_box.engine.worker import main"),
        ("__main__", "from pinaivu_box.engine.engine import Engine"),
        ("engine.worker", "from pinaivu_box.config import Config"),
        ("engine.engine", "import llama_cpp.llama_cpp as llama"),
        ("server.chat", "def f():\n    import llama_cpp"),
        ("transport.link", "def f():\n    from iroh import Endpoint"),
        ("transport.link", "from pinaivu_box.membership import records"),
        ("gateway.request", "from pinaivu_box.legs.runner import LegRunner"),
        ("routing.router", "from pinaivu_box.legs import wire"),
        ("server.chat", "from ..cli import main"),
        ("errors", "from . import config"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert violations(module, source)


def test_the_parent_loads_neither_llama_cpp_nor_numpy_nor_what_peering_needs() -> None:
    """Importing every module of the parent's side leaves them out of sys.modules, but for the
    modules that are theirs: those are imported where links are made, and nowhere before."""
    names = [f"{PACKAGE}.{name}" for name in MODULES if name and not in_engine(name)]
    names = [name for name in names if name != f"{PACKAGE}.__main__"]  # it would run the command
    theirs = tuple(f"{PACKAGE}.{ONLY_IN[library]}" for library in ("iroh", "zeroconf"))
    names = [name for name in names if not name.startswith(theirs)]
    assert {f"{PACKAGE}.box", f"{PACKAGE}.server.app", f"{PACKAGE}.cli.serve"} <= set(names)
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
unwanted = {{"llama_cpp", "numpy", "iroh", "pynvml", "segno", "zeroconf"}}
print(*sorted(unwanted & {{name.split(".")[0] for name in sys.modules}}))
print(*sorted(name for name in sys.modules if name.startswith("pinaivu_box.engine.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["", f"{PACKAGE}.engine.messages"]


def test_version_loads_nothing_heavy() -> None:
    """`pinaivu --version` feels instant: it imports no server, no wire types, no database."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert f"{PACKAGE}.cli.main" in loaded and "click" in loaded
    top = {name.split(".")[0] for name in loaded}
    heavy = {"starlette", "msgspec", "aiosqlite", "httpx", "hypercorn", "rich", "nacl", "numpy"}
    assert not top & (heavy | {"iroh", "segno", "zeroconf"})


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (
            ("cli.main", "cli.serve", "box_services", "server.serve"),
            ("httpx", "rich", "jinja2", "markdown_it", "pygments", "authlib", "joserfc"),
        ),
        (("__main__", "sandbox", "models.header_reader"), ("click", "asyncio", "subprocess")),
    ],
)
def test_a_start_loads_nothing_that_can_wait(
    modules: tuple[str, ...], unwanted: tuple[str, ...]
) -> None:
    """What the first page, pull or upstream of a box needs comes with it; a sandbox, of which every
    box starts some, needs no command line and no event loop."""
    code = f"import sys, {', '.join(f'{PACKAGE}.{name}' for name in modules)}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert PACKAGE in loaded and not loaded & set(unwanted)


TEST_PROGRAMS = [path for path in (ROOT / "tests").rglob("*") if path.suffix in ("", ".py")]


def imports_a_test(source: str) -> bool:
    """Whether a module of the tests imports from a test file."""
    names = imports(source, "")
    return any(part.startswith("test_") for name in names for part in name.split(".")[:-1]) or any(
        name.startswith("tests.") and name.rpartition(".")[2].startswith("test_") for name in names
    )


def test_nothing_imports_from_a_test_file() -> None:
    sources = {path: path.read_text() for path in TEST_PROGRAMS if path.is_file()}
    python = {
        path: source
        for path, source in sources.items()
        if path.suffix == ".py" or "python" in source.partition("\n")[0]
    }
    assert len(python) > 100
    assert [path.name for path, source in python.items() if imports_a_test(source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "from tests.peering.test_network import Site",
        "from tests.peering import test_network",
        "import tests.test_crash",
        "def f():\n    from tests.test_crash import Stream",
    ],
)
def test_the_check_sees_an_import_from_a_test_file(source: str) -> None:
    assert imports_a_test(source)


def test_a_command_on_the_database_loads_no_server_and_no_client(tmp_path: Path) -> None:
    """`pinaivu keys ls` and its like start fast: they need neither HTTP nor links."""
    for command in (("keys", "ls"), ("accounts", "ls"), ("audit",), ("usage",)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", PACKAGE, *command, "--home", str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        lines = [line for line in done.stderr.splitlines() if "|" in line]
        loaded = {line.rpartition("|")[2].strip() for line in lines}
        assert f"{PACKAGE}.store.database" in loaded
        heavy = {"starlette", "httpx", "hypercorn", "llama_cpp", "numpy", "iroh", "zeroconf"}
        assert not {name.split(".")[0] for name in loaded} & heavy, command
        assert f"{PACKAGE}.box" not in loaded and f"{PACKAGE}.server" not in loaded
