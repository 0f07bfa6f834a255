"""The log of a service: in the journal, with fields, and without what is nobody else's business."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pinaivu_box.systemd.journal import JournalHandler, field_name, is_journal
from tests.support.journal_socket import JournalSocket
from tests.support.process_box import PINAIVU, Box, environment, wait_until

NewBox = Callable[..., Box]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[JournalSocket]:
    with JournalSocket(tmp_path / "journal") as journal:
        yield journal


def test_a_request_can_be_found_by_its_fields(
    journal: JournalSocket, new_box: NewBox, tmp_path: Path
) -> None:
    log = tmp_path / "home0.err"  # where `new_box` has its first box write it
    log.touch()
    box = new_box("--model", "fake:1=fake:0", env=journal.environment(log))
    answer = box.client.chat.completions.create(
        model="fake:1", messages=[{"role": "user", "content": "zanzibar"}], max_tokens=4
    )
    entry = journal.wait_for(REQUEST_ID=answer.request_id)
    assert entry["MODEL"] == "fake:1" and entry["KEY"].startswith("key_")
    assert (entry["STATUS"], entry["COMPLETION_TOKENS"]) == ("200", "4")
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("6", "pinaivu")
    # People read the message alone, which the journal shows with the time.
    assert entry["MESSAGE"].startswith("request request_id=req_") and "fake:1" in entry["MESSAGE"]
    assert not any("zanzibar" in value or box.key in value for value in entry.values())
    assert answer.request_id not in box.errors  # once is enough

    (Path(box.home) / "config.toml").write_text("[server]\nprot = 1\n")
    assert box.http("POST", "/v1/admin/reload").status_code == 422
    box.process.send_signal(1)
    assert "prot" in journal.wait_for(PRIORITY="3")["MESSAGE"]


def test_a_service_writes_no_key_into_the_journal(journal: JournalSocket, tmp_path: Path) -> None:
    """Whose output is the journal, who may read that is not who may have the first key."""
    home, log = tmp_path / "home", tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*PINAIVU, "serve", "--home", str(home), "--port", "0"],
            stdout=output,
            stderr=output,
            env=environment(**journal.environment(log)),
        )
    try:
        entry = journal.wait_for(LOGGER="pinaivu.serve")
        assert entry["MESSAGE"].startswith("serving url=http://localhost:")
        assert entry["URL"].startswith("http://localhost:")
        wait_until((home / "run.json").exists, "it to serve")
    finally:
        process.terminate()
        process.wait(60)
    assert "sk-pnv-" not in log.read_text() + repr(journal.entries)
    assert log.read_text() == ""


def record(message: str, /, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("pinaivu.test", logging.WARNING, "", 0, message, None, None)
    made.fields = fields
    return made


@pytest.fixture
def handler(journal: JournalSocket) -> Iterator[JournalHandler]:
    handler = JournalHandler({"PINAIVU_JOURNAL_SOCKET": str(journal.path)})
    yield handler
    handler.close()


def test_what_a_client_sends_makes_up_no_field(
    journal: JournalSocket, handler: JournalHandler
) -> None:
    path = "/a\nPRIORITY=0\nMESSAGE=forged"
    handler.emit(record("http", path=path, none=None, message="of a field"))
    wait_until(lambda: journal.entries, "the entry")
    assert journal.entries == [
        {
            "MESSAGE": "http",
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "pinaivu",
            "LOGGER": "pinaivu.test",
            "PATH": path,
            "PINAIVU_MESSAGE": "of a field",
        }
    ]


def test_an_entry_that_is_too_large_for_a_datagram(
    journal: JournalSocket, handler: JournalHandler
) -> None:
    handler.emit(record("large", **{f"n{number}": "x" * 60_000 for number in range(20)}))
    assert len(journal.wait_for(MESSAGE="large")["N19"]) == 60_000


def test_without_a_journal_the_line_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = JournalHandler({"PINAIVU_JOURNAL_SOCKET": str(tmp_path / "nobody")})
    handler.emit(record("all the same"))
    handler.close()
    assert capsys.readouterr().err == "all the same\n"


@pytest.mark.parametrize(
    ("name", "in_journal"),
    [
        ("request_id", "REQUEST_ID"),
        ("ttft_ms", "TTFT_MS"),
        ("priority", "PINAIVU_PRIORITY"),
        ("_pid", "PID"),
        ("2nd", "PINAIVU_2ND"),
        ("a.b-c", "A_B_C"),
        ("é", ""),
        ("x" * 80, "X" * 64),
    ],
)
def test_names_of_fields_are_those_that_the_journal_takes(name: str, in_journal: str) -> None:
    assert field_name(name) == in_journal


def test_who_redirects_the_output_has_it_there(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = (tmp_path / "log").stat()
        stream = f"{status.st_dev}:{status.st_ino}"
        assert is_journal(file.fileno(), {"JOURNAL_STREAM": stream})
        assert not is_journal(file.fileno(), {"JOURNAL_STREAM": f"{status.st_dev}:1"})
        assert not is_journal(file.fileno(), {})
    assert not is_journal(999, {"JOURNAL_STREAM": stream})
