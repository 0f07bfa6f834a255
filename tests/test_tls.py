"""HTTPS: certificates, what commands trust, what nonsense on the port does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from pinaivu_box import box as boxes
from pinaivu_box import box_services
from pinaivu_box import config as configs
from pinaivu_box.config import Config
from pinaivu_box.doctor import machine, network
from pinaivu_box.errors import CliError, NotRunning
from pinaivu_box.server_config import ServerConfig
from pinaivu_box.tls import certificate as certificates
from pinaivu_box.tls import pinned, self_signed
from tests.support.certificates import fingerprint, make_certificate
from tests.support.in_process_command import run_command
from tests.support.process_box import Box, StartBox, wait_until
from tests.support.waiting import wait_until as wait_for

FAKE = "fake:1"
SELF_SIGNED = '[server]\ntls = "self-signed"\ntls_names = ["box.lan", "192.0.2.9"]\n'


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box("--model", f"{FAKE}=fake:1", config=SELF_SIGNED)


def port_of(box: Box) -> int:
    return int(box.url.rpartition(":")[2])


def shown_by(box: Box) -> str:
    """The fingerprint of the certificate that new connections get."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port_of(box)), 180) as plain,
        context.wrap_socket(plain) as secured,
    ):
        data = secured.getpeercert(binary_form=True)
    assert data is not None
    return fingerprint(ssl.DER_cert_to_PEM_cert(data).encode())


# -- the box's own certificate -------------------------------------------------------------------


def test_a_box_makes_its_certificate_and_prints_the_fingerprint(box: Box) -> None:
    cert = box.home / self_signed.CERT
    assert box.url.startswith("https://") and "https://localhost:" in box.output
    printed = "".join(box.output.split("SHA-256")[1].split("API key")[0].split())
    # Two lines of it, without the colon in between.
    assert printed.replace(":", "") == fingerprint(cert).replace(":", "")
    assert shown_by(box) == fingerprint(cert)
    key = box.home / self_signed.KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_its_certificate_is_what_clients_expect_of_one(box: Box) -> None:
    found = x509.load_pem_x509_certificate((box.home / self_signed.CERT).read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = names.get_values_for_type(x509.DNSName)
    addresses = set(map(str, names.get_values_for_type(x509.IPAddress)))
    assert {"localhost", "box.lan", socket.gethostname().lower()} <= set(hosts)
    assert {"127.0.0.1", "::1", "192.0.2.9"} <= addresses
    assert found.not_valid_after_utc - found.not_valid_before_utc <= timedelta(days=398)
    key = found.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    # A client that has been given it, and checks names as ever.
    context = ssl.create_default_context(cafile=str(box.home / self_signed.CERT))
    url = f"https://localhost:{port_of(box)}/health"
    assert httpx.get(url, verify=context, trust_env=False, timeout=180).status_code == 200


def test_it_stays_until_it_is_near_its_end_or_lacks_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, _ = self_signed.ensure(tmp_path, ("localhost",))
    first = fingerprint(cert)
    self_signed.ensure(tmp_path, ("localhost", "LOCALHOST"))
    assert fingerprint(cert) == first
    self_signed.ensure(tmp_path, ("localhost", "box.lan"))
    second = fingerprint(cert)
    assert second != first
    monkeypatch.setattr(self_signed, "_RENEWED_BEFORE", timedelta(days=398))
    self_signed.ensure(tmp_path, ("localhost", "box.lan"))
    assert fingerprint(cert) != second
    (tmp_path / self_signed.KEY).unlink()
    monkeypatch.undo()
    self_signed.ensure(tmp_path, ("localhost", "box.lan"))
    assert certificates.read(cert, tmp_path / self_signed.KEY)


def test_a_running_box_renews_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "_LOOK_AT_CERTIFICATE_SECONDS", 0.01)
    load = partial(configs.load, None, environ={}, overrides={("server", "tls"): "self-signed"})

    async def scenario() -> None:
        async with box_services.open_box(load, tmp_path) as box:
            first = box.settings.current.certificate
            monkeypatch.setattr(self_signed, "_RENEWED_BEFORE", timedelta(days=398))
            await wait_for(lambda: box.settings.current.certificate != first)
            monkeypatch.undo()
            shown = fingerprint(tmp_path / "tls/served.crt")
            assert first is not None and shown != first.fingerprint

    asyncio.run(scenario())


# -- certificates of others ----------------------------------------------------------------------


def test_files_that_cannot_be_used_are_told_in_a_sentence(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    assert certificates.read(cert, key).fingerprint == fingerprint(cert)
    _, other = make_certificate(tmp_path, name="other")
    old = make_certificate(tmp_path, name="old", days=-1, since=30)
    early = make_certificate(tmp_path, name="early", since=-5)
    locked = make_certificate(tmp_path, name="locked", passphrase=b"secret")
    fifo = tmp_path / "fifo"
    fifo.mkdir()
    for wrong, why in (
        ((tmp_path / "none", key), "cannot be read: No such file"),
        ((cert, tmp_path / "none"), "cannot be read: No such file"),
        ((fifo, key), "cannot be read"),
        ((key, key), "no certificate in PEM"),
        ((cert, cert), "no private key in PEM"),
        ((cert, other), "does not belong to the certificate"),
        (old, "expired on"),
        (early, "valid from"),
        (locked, "has a passphrase"),
    ):
        with pytest.raises(CliError) as raised:
            certificates.read(*wrong)
        assert why in raised.value.message and raised.value.message.endswith(".")


def test_a_box_with_such_files_does_not_start(tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path)
    _, key = make_certificate(tmp_path, name="other")
    config = tmp_path / "box.toml"
    config.write_text(f'[server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n')
    done = run_command(
        "serve", "--config", str(config), "--port", "0", home=tmp_path / "home", check=False
    )
    assert done.returncode == 1 and "does not belong" in done.stderr
    assert "Traceback" not in done.stderr


# -- a running box -------------------------------------------------------------------------------


def test_commands_reach_it_by_its_certificate(box: Box) -> None:
    assert "COMMAND" not in run_command("ps", home=box.home).stdout
    assert run_command("run", FAKE, "hi", "--set", "max_tokens=3", home=box.home).stdout.strip()
    done = run_command(
        "bench", box.url, "--model", FAKE, "--key", box.key, "--requests", "1", "--warmup", "0",
        "--json", home=None, env={"PINAIVU_HOME": str(box.home)},
    )  # fmt: skip
    assert json.loads(done.stdout)
    port = machine.port(box.home, Config())
    assert port.state == "ok" and "https://" in port.found
    tls = network.tls(Config(server=ServerConfig(tls="self-signed")), box.home)
    assert tls.state == "ok" and fingerprint(box.home / self_signed.CERT) in tls.found


def test_a_server_with_another_certificate_is_not_ours(box: Box, tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path)
    run = json.loads((box.home / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run))
    pinned.publish(tmp_path, cert.read_bytes())
    done = run_command("ps", home=tmp_path, check=False)
    assert done.returncode != 0 and "No box is running" in done.stderr


def test_one_that_has_expired_still_leads_commands_to_it(tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path, days=-1, since=30)
    pinned.publish(tmp_path, cert.read_bytes())
    assert isinstance(pinned.context_for(tmp_path, "https://127.0.0.1:1"), ssl.SSLContext)
    assert pinned.context_for(tmp_path, "http://127.0.0.1:1") is False
    with pytest.raises(NotRunning):
        pinned.context_for(tmp_path / "none", "https://127.0.0.1:1")


NONSENSE = (
    b"GET / HTTP/1.1\r\nHost: box\r\n\r\n",
    b"garbage\r\n\r\n",
    b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    b"\x16\x03\x01\xff\xff" + b"\x00" * 100,
    b"",
)


def test_what_is_not_tls_closes_the_connection_and_is_not_worth_a_line(box: Box) -> None:
    for data in NONSENSE:
        with socket.create_connection(("127.0.0.1", port_of(box)), 180) as plain:
            plain.sendall(data)
            plain.shutdown(socket.SHUT_WR)
            try:
                answer = plain.recv(1000)
            except ConnectionResetError:
                answer = b""
            assert not answer.startswith(b"HTTP")
    # Nonsense after the handshake, and one that goes away in the middle of an answer.
    for data in (b"\x17\x03\x03\x00\x20" + b"x" * 32, b"nonsense"):
        context = pinned.pinned_context(box.home)
        with socket.create_connection(("127.0.0.1", port_of(box)), 180) as plain:
            secured = context.wrap_socket(plain)
            body = json.dumps({"model": FAKE, "messages": [{"role": "user", "content": "hi"}],
                               "stream": True, "max_tokens": 2000})  # fmt: skip
            secured.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer "
                f"{box.key}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert secured.recv(12).startswith(b"HTTP/1.1 200")
            raw = socket.socket(fileno=secured.detach())
            raw.sendall(data)
            raw.close()
    assert box.http("GET", "/health").status_code == 200
    wait_until(lambda: not box.http("GET", "/v1/engines").json()["data"][0]["running"], "all ended")
    assert "Traceback" not in box.errors and "rror" not in box.errors


def test_an_answer_before_the_body_was_read_arrives_whole(box: Box) -> None:
    answer = box.http("POST", "/v1/chat/completions", content=b"x" * 30_000_000)
    assert answer.status_code == 413 and answer.json()["error"]


def test_a_reload_takes_new_files_and_drops_no_connection(box: Box, tmp_path: Path) -> None:
    config = Path(box.args[1])
    first = make_certificate(tmp_path, name="first")
    second = make_certificate(tmp_path, name="second")
    context = pinned.pinned_context(box.home)
    config.write_text(f'[server]\ntls_cert = "{first[0]}"\ntls_key = "{first[1]}"\n')
    try:
        kept = HTTPSConnection("127.0.0.1", port_of(box), timeout=180, context=context)
        with contextlib.closing(kept):
            kept.connect()
            first_socket = kept.sock
            run_command("reload", home=box.home)
            assert shown_by(box) == fingerprint(first[0])
            for old, new in zip(first, second, strict=True):
                old.write_bytes(new.read_bytes())
            run_command("reload", home=box.home)
            assert shown_by(box) == fingerprint(second[0])
            kept.request("GET", "/health")
            answer = kept.getresponse()
            assert answer.status == 200 and kept.sock is first_socket
            answer.read()
            first[1].write_text("no key")
            refused = run_command("reload", home=box.home, check=False)
            assert refused.returncode == 1 and "no private key in PEM" in refused.stderr
            assert shown_by(box) == fingerprint(second[0])
    finally:
        config.write_text(SELF_SIGNED)
        run_command("reload", home=box.home)
    assert shown_by(box) == fingerprint(box.home / self_signed.CERT)


def test_turning_tls_off_needs_a_restart(box: Box) -> None:
    config = Path(box.args[1])
    config.write_text("")
    try:
        done = json.loads(run_command("reload", "--json", home=box.home).stdout)
    finally:
        config.write_text(SELF_SIGNED)
        run_command("reload", home=box.home)
    assert "server.tls" in done["restart"] and "server.tls" not in done["applied"]


def test_what_runs_at_the_end_is_finished(new_box: Callable[..., Box]) -> None:
    box = new_box("--model", "slow:1=fake:20", config=SELF_SIGNED + "[engine]\ndrafting = false\n")
    body: dict[str, Any] = {"model": "slow:1", "messages": [{"role": "user", "content": "hi"}]}
    with (
        httpx.Client(
            base_url=box.url, verify=pinned.pinned_context(box.home), trust_env=False, timeout=180
        ) as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={**body, "stream": True, "max_tokens": 40},
            headers={"Authorization": f"Bearer {box.key}"},
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        box.process.terminate()
        assert "data: [DONE]" in list(lines)
    assert box.process.wait(180) == 0
    assert "Traceback" not in box.errors


# -- doctor --------------------------------------------------------------------------------------


def test_doctor_warns_before_the_end_and_of_proxies_that_anybody_can_be(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, days=20)
    found = certificates.read(cert, key)
    assert network.expiry(found, time.time(), renewed=False).state == "ok"
    late = (datetime.now(UTC) + timedelta(days=10)).timestamp()
    soon = network.expiry(found, late, renewed=False)
    assert soon.state == "warning" and found.fingerprint in soon.found

    def told(*trusted: str) -> list[str]:
        config = Config(server=ServerConfig(trusted_proxies=trusted))
        return [check.state for check in network.proxies(config)]

    assert told("127.0.0.1", "10.0.0.0/8") == []
    assert told("0.0.0.0/0", "::/0") == ["failed", "failed"]
