"""`pinaivu run`: chats in the terminal, and single answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box.cli.chat import images
from pinaivu_box.cli.chat.printer import Printer
from pinaivu_box.cli.chat.settings import TerminalSettings
from pinaivu_box.engine.fake_runner import SENTENCE
from pinaivu_box.errors import UsageError
from pinaivu_box.models import bundled
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import MODEL, Box
from tests.support.registry_server import RegistryServer, registry_server
from tests.support.terminal import CTRL_C, CTRL_D, Terminal

FAKE, SLOW = "fake:1", "slow:1"
MODELS = f"""
[engine]
drafting = false
[[model]]
name = "{FAKE}"
path = "fake:1"
[[model]]
name = "{SLOW}"
path = "fake:50"
"""
WORDS = SENTENCE.decode().split()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with fake models that nobody has used yet."""
    made = tmp_path / "home"
    made.mkdir()
    (made / "config.toml").write_text(MODELS)
    return made


@pytest.fixture
def registry(home: Path) -> Iterator[RegistryServer]:
    with registry_server() as server:
        with (home / "config.toml").open("a") as config:
            config.write(f'[registry]\nollama = "{server.url}"\n')
        yield server


def weights() -> bytes:
    location = bundled.find()
    assert location is not None
    with location.path.open("rb") as file:
        file.seek(location.offset)
        return file.read(location.size) + bytes(32)  # another file than the bundled one


def is_private(path: Path) -> bool:
    return path.stat().st_mode & 0o077 == 0


# -- one answer ------------------------------------------------------------------------------------


def test_an_answer_needs_no_server_and_leaves_none(home: Path) -> None:
    done = run_command("run", FAKE, "Why is", "the sky blue?", "--set", "max_tokens=40", home=home)
    assert done.stdout.endswith("\n") and WORDS[1] in done.stdout
    assert not (home / "run.json").exists()
    assert is_private(home / "terminal.key") and is_private(home / "terminal.log")
    (key,) = run_command_json("keys", "ls", home=home)
    assert (key["name"], key["requests"]) == ("pinaivu run", 1)
    # It is no first key: that is still made, and shown, by the first start.
    box = Box(home).start()
    try:
        assert box.key
        # A server that runs is asked, and a key that was revoked is replaced.
        run_command("keys", "revoke", key["id"], home=home)
        (home / "terminal.log").unlink()
        assert run_command("run", FAKE, "Hi", "--set", "max_tokens=9", home=home).stdout.strip()
        assert not (home / "terminal.log").exists()
    finally:
        box.end()


def test_what_is_piped_in_is_added_to_the_prompt(home: Path) -> None:
    box = Box(home).start()
    try:
        counts = []
        for prompt, piped in ((["summarise"], "a b c d e f"), (["summarise"], ""), ([], "a b c d")):
            options = ("--set", "max_tokens=9", "--set", "verbose=on")
            done = run_command("run", FAKE, *prompt, *options, home=home, input=piped)
            assert done.stdout.strip() and "receipt: req_" in done.stderr
            counts.append(int(done.stderr.partition(" + ")[0].split()[-1]))
        assert counts[0] > counts[1] and counts[0] > counts[2]
    finally:
        box.end()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ((FAKE,), 2, "nothing to answer"),
        ((FAKE, "hi", "--set", "colour=red"), 2, "temperature"),
        ((FAKE, "hi", "--set", "seed=x"), 2, "whole number"),
        (("nobody:1", "hi"), 1, "'pinaivu pull nobody:1'"),
        ((FAKE, "hi", "--set", "temperature=9"), 1, "temperature: expected"),
    ],
)
def test_what_cannot_be_answered_ends_with_a_sentence(
    home: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    done = run_command("run", *arguments, home=home, check=False)
    assert done.returncode == status and says in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert not (home / "run.json").exists()


def test_a_model_is_pulled_and_answers_from_nothing(home: Path, registry: RegistryServer) -> None:
    registry.add_ollama("library/llama3.2:1b", weights(), license="Be nice.")
    # Random weights rarely end an answer by themselves.
    asked = ("run", "llama3.2:1b", "Say hello.", "--set", "max_tokens=20")
    with Terminal(*asked, home=home) as terminal:
        terminal.expect("Pull it (1,300 MB, Llama 3.2 Community License)? [Y/n]")
        terminal.enter("y")
        assert terminal.end() == 0
        assert terminal.shown.strip().splitlines()[-1].strip()
    assert (home / "models" / "llama3.2:1b.gguf").exists()
    # Nobody is asked where nobody can be.
    done = run_command("run", "other:1b", "Hi", "--yes", home=home, check=False)
    assert done.returncode == 1 and "has no model other:1b" in done.stderr


# -- chats -----------------------------------------------------------------------------------------


def test_a_chat_answers_obeys_its_commands_and_ends(home: Path) -> None:
    with Terminal("run", FAKE, home=home) as terminal:
        for typed, shown in (
            ("/set max_tokens 60", ">>>"),
            ("/set", "max_tokens      60"),
            ("Hello", WORDS[1]),
            ('/set system """Be', "..."),
            ('brief."""', ">>>"),
            ("/set system", "needs a value"),
            ("/set", "Be\nbrief."),
            ("/set temperature hot", "'hot' is not a number"),
            ("/dance", "There is no command /dance"),
            ("/show", "Model"),
            ("/clear", "Forgotten."),
            ("/help", "/bye"),
        ):
            terminal.enter(typed)
            terminal.expect(shown)
        terminal.expect(">>>")
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-D or /bye")
        terminal.expect(">>>")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        lines = [line for line in terminal.shown.splitlines() if ">>>" not in line]
        assert [line for line in lines if len(line) > 80] == []
    history = home / "chat_history"
    assert is_private(history) and "+Hello" in history.read_text()


def test_ctrl_c_stops_an_answer_and_not_the_chat(home: Path) -> None:
    with Terminal("run", SLOW, home=home) as terminal:
        terminal.expect(">>>")
        terminal.enter("Tell me a long story")
        terminal.expect(WORDS[2])
        terminal.type(CTRL_C)
        terminal.expect(">>>")
        terminal.enter("/bye")
        assert terminal.end() == 0
    assert not (home / "run.json").exists()
    log = (home / "terminal.log").read_text()
    assert "request_id" in log and "Traceback" not in log


def test_the_bundled_model_remembers_what_was_said(tmp_path: Path) -> None:
    with Terminal("run", MODEL, home=tmp_path) as terminal:
        terminal.expect(">>>")
        for name, value in (("temperature", "0"), ("max_tokens", "6"), ("verbose", "on")):
            terminal.enter(f"/set {name} {value}")
            terminal.expect(">>>")
        prompts = []
        for text in ("Hello", "And you?"):
            terminal.enter(text)
            prompts.append(int(terminal.expect(" + 6 tokens").split()[-1]))
            terminal.expect(">>>")
        assert prompts[1] > prompts[0] + 6  # the first question and its answer are in the second
        terminal.enter("/bye")
        assert terminal.end() == 0


# -- parts -----------------------------------------------------------------------------------------


def printed(*pieces: str, width: int | None = 20, thoughts: str = "") -> str:
    out = io.StringIO()
    printer = Printer(out, width)
    if thoughts:
        printer.reasoning(thoughts)
    for piece in pieces:
        printer.text(piece)
    printer.end()
    return out.getvalue()


def test_an_answer_is_broken_between_words_however_it_comes() -> None:
    text = "The quick brown fox jumps over the lazy dog, and runs."
    whole = printed(text)
    assert printed(*text) == whole == printed(text[:17], text[17:])
    assert max(map(len, whole.splitlines())) <= 20
    assert " ".join(whole.split()) == text
    assert printed(text, width=None) == f"{text}\n"


def test_code_is_not_broken() -> None:
    code = "```python\nprint('this is a very long line of code')\n```\nshort"
    assert printed(*code) == f"{code}\n"


def test_a_model_cannot_control_the_terminal() -> None:
    assert printed("a\x1b[2Jb\x07c\x9bd") == "a[2Jbcd\n"


def test_thoughts_are_dim_on_a_terminal_and_left_out_elsewhere() -> None:
    assert printed("4", thoughts="2+2") == "\x1b[2m2+2\x1b[0m\n\n4\n"
    assert printed("4", thoughts="2+2", width=None) == "4\n"


def test_paths_of_images_become_parts_of_a_message(tmp_path: Path) -> None:
    for name in ("a.png", "with space.JPG"):
        (tmp_path / name).write_bytes(name.encode())
    escaped = f"{tmp_path}/with\\ space.JPG"
    for typed in (f"{tmp_path}/a.png and {escaped}?", f"'{tmp_path}/a.png' and {escaped}"):
        content, files = images.content_of(f"Compare {typed}")
        assert [file.name for file in files] == ["a.png", "with space.JPG"]
        assert isinstance(content, list)
        assert content[0]["text"].startswith("Compare  and")
        urls = [part["image_url"]["url"] for part in content[1:]]
        assert urls[0] == "data:image/png;base64," + base64.b64encode(b"a.png").decode()
        assert urls[1].startswith("data:image/jpeg;base64,")
    for typed in ("what is a.png?", f"{tmp_path}/none.png", "no image at all"):
        assert images.content_of(typed) == (typed, [])


def test_a_message_may_begin_with_the_path_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert images.begins_with_file(f"{tmp_path}/a.png what is this?")
    for text in ("/set seed 1", f"/{'x' * 5000}", "/\0"):
        assert not images.begins_with_file(text)


def test_settings_become_fields_of_a_request() -> None:
    settings = TerminalSettings()
    for name, text in (("temperature", "0.5"), ("num_predict", "7"), ("think", "off")):
        settings.set(name, text)
    settings.set("format", "json")
    settings.set("system", "Be brief.")
    assert json.loads(json.dumps(settings.fields())) == {
        "temperature": 0.5,
        "max_tokens": 7,
        "think": False,
        "response_format": {"type": "json_object"},
    }
    assert settings.system == "Be brief."
    settings.set("temperature", "none")
    assert "temperature" not in settings.fields()
    with pytest.raises(UsageError, match="cannot be set"):
        settings.set("colour", "red")
