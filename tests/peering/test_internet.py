"""Peers that are not on the same LAN: addresses that an operator names, ceilings on what strangers
may charge, and a box that is put out and says so."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pinaivu_box.config import Config, load
from pinaivu_box.errors import CliError
from pinaivu_box.membership.tickets import decode, encode
from tests.support.in_process_command import run_command, run_command_json
from tests.support.peer_box import PeerBox
from tests.support.process_box import on_terminal, wait_until

PRICED = '[pricing]\nper_1k_tokens = "1"\n'
FAR = "far:1"


def reachable_at(box: PeerBox) -> str:
    """By a name, as an operator would write it."""
    settings = tomllib.loads((box.home / "config.toml").read_text())
    return f"localhost:{settings['peering']['port']}"


def with_settings(box: PeerBox, more: str) -> None:
    """Of [peering], which comes first in the file."""
    file = box.home / "config.toml"
    text = file.read_text()
    file.write_text(text.replace("[peering]\n", f"[peering]\n{more}\n", 1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PeerBox, PeerBox]]:
    """Anna advertises a name, and asks 1 for 1,000 tokens of a model that ben has not."""
    folder = tmp_path_factory.mktemp("internet")
    anna = PeerBox(folder / "anna", "anna", PRICED, "--model", f"{FAR}=fake:0")
    ben = PeerBox(folder / "ben", "ben", PRICED)
    with_settings(anna, f'advertise = ["{reachable_at(anna)}"]')
    anna.start()
    ben.start()
    yield anna, ben
    anna.end()
    ben.end()


@pytest.fixture(scope="module")
def joined(pair: tuple[PeerBox, PeerBox]) -> tuple[PeerBox, PeerBox]:
    """By a ticket that does not say where anna is, and what its operator was told on the phone."""
    anna, ben = pair
    lost = encode(replace(decode(anna.invite("--name", "ben")), addresses=()))
    code, said = ben.refused("join", lost)
    assert code == 1 and "no address" in said
    ben.peers("join", lost, "--at", reachable_at(anna))
    wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "both are connected")
    wait_until(lambda: ben.listed()["anna"]["models"], "ben to hear what anna offers")
    return anna, ben


def ask(box: PeerBox, tokens: int = 10) -> Any:
    body = {"model": FAR, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    return box.http("POST", "/v1/chat/completions", json=body)


# -- addresses -------------------------------------------------------------------------------------


def test_the_advertised_address_is_in_tickets_and_adverts(joined: tuple[PeerBox, PeerBox]) -> None:
    anna, ben = joined
    where = reachable_at(anna)
    assert decode(anna.invite()).addresses[0] == where
    assert anna.admin("GET").json()["own"]["addresses"][0] == where
    wait_until(lambda: where in ben.listed()["anna"]["addresses"], "the advert to say it")
    checks = {one["name"]: one for one in run_command_json("peers", "doctor", home=anna.home)}
    assert where in checks["NAT"]["found"] and checks["NAT"]["state"] == "ok"


NONE = ["localhost", "4002", "localhost:0", "localhost:70000", "a b:1", "[::g]:1", "::1:1",
        "https://relay.example.org", "-x:1", ""]  # fmt: skip


def configured(folder: Path, settings: str) -> Config:
    file = folder / "box.toml"
    file.write_text(f"[peering]\n{settings}\n")
    return load(file, environ={})


def test_an_address_that_is_none_is_refused_everywhere(
    joined: tuple[PeerBox, PeerBox], tmp_path: Path
) -> None:
    anna, ben = joined
    ticket = anna.invite()
    code, said = ben.refused("join", ticket, "--at", NONE[0])
    assert code == 2 and "HOST:PORT" in said
    for address in NONE:
        answer = ben.admin("POST", body={"ticket": ticket, "at": [address]})
        assert answer.status_code == 422 and answer.json()["detail"][0]["loc"][:2] == ["body", "at"]
        with pytest.raises(CliError, match=r"peering\.advertise"):
            configured(tmp_path, f'advertise = ["{address}"]')


@pytest.mark.parametrize("address", ["box.example.org:4002", "[2001:db8::1]:4002", "1.2.3.4:1"])
def test_an_address_may_be_a_name_or_of_either_kind(tmp_path: Path, address: str) -> None:
    made = configured(tmp_path, f'advertise = ["{address}"]')
    assert made.peering.advertise == (address,)


# -- what it may cost ------------------------------------------------------------------------------


def test_peers_are_not_used_beyond_what_they_may_charge(joined: tuple[PeerBox, PeerBox]) -> None:
    _, ben = joined
    file = ben.home / "config.toml"
    plain = file.read_text()
    try:
        with_settings(ben, 'max_price = "0.999999"')
        run_command("reload", home=ben.home)
        refused = ask(ben)
        assert refused.status_code == 503 and "max_price" in refused.json()["error"]["message"]
        assert {FAR, "fake:1"} <= set(ben.listed()["anna"]["cost"]["too_dear"])
        assert "above max_price" in run_command("peers", "show", "anna", home=ben.home).stdout
        file.write_text(plain)
        with_settings(ben, 'max_price = "1"\nmax_debt = "0.5"')
        run_command("reload", home=ben.home)
        owed = [Decimal(0)]
        while (answer := ask(ben)).status_code == 200:
            owed.append(Decimal(ben.listed()["anna"]["cost"]["owes"]))
            assert owed[-2] < owed[-1] <= Decimal("0.5")  # never over it
        assert answer.status_code == 503 and len(owed) > 1
        message = answer.json()["error"]["message"]
        assert "max_debt" in message and f"{owed[-1]} credits" in message
        # It is seen where it is paid.
        cost = ben.listed()["anna"]["cost"]
        assert cost == {
            "received": str(owed[-1]), "owes": str(owed[-1]), "max_debt": "0.5", "too_dear": [],
        }  # fmt: skip
        (balance,) = run_command_json("ledger", home=ben.home)
        assert (balance["balance"], balance["max_debt"]) == (f"-{owed[-1]}", "0.5")
        for command, said in ((("peers", "ls"), f"{owed[-1]}/0.5"), (("ledger",), f"-{owed[-1]}")):
            status, shown = on_terminal(*command, home=ben.home)
            assert status == 0 and said in shown and "anna" in shown
            assert max(map(len, shown.splitlines())) <= 80
        # What would cost less than what is left still goes.
        file.write_text(plain)
        with_settings(ben, 'max_debt = "1"')
        run_command("reload", home=ben.home)
        assert ask(ben).status_code == 200
    finally:
        file.write_text(plain)
        run_command("reload", home=ben.home)


@pytest.mark.parametrize("setting", ['max_price = "x"', 'max_debt = "-1"', 'max_price = "1e-9"'])
def test_a_ceiling_is_an_amount(tmp_path: Path, setting: str) -> None:
    with pytest.raises(CliError, match=f"peering.{setting.split()[0]}"):
        configured(tmp_path, setting)


# -- who is put out --------------------------------------------------------------------------------


def test_a_revoked_box_says_revoked(tmp_path: Path) -> None:
    anna, ben = PeerBox(tmp_path / "anna", "anna"), PeerBox(tmp_path / "ben", "ben")
    try:
        anna.start()
        ben.start()
        assert ben.admin("GET").json()["own"]["state"] == "alone"
        ben.peers("join", anna.invite("--name", "ben"))
        wait_until(lambda: anna.sees("ben") and ben.sees("anna"), "both are connected")
        assert ben.admin("GET").json()["own"]["state"] == "member"
        anna.peers("rm", "ben", "--reason", "sold")

        def own() -> dict[str, Any]:
            found: dict[str, Any] = ben.admin("GET").json()["own"]
            return found

        wait_until(lambda: own()["state"] == "revoked", "ben to know it")
        assert "sold" in own()["why"]
        assert anna.admin("GET").json()["own"]["state"] == "member"
        # Also one that was away, or has forgotten: it hears of it from whoever it calls.
        ben.stop()
        ben.start()
        wait_until(lambda: own()["state"] == "revoked", "ben to be told again")
        done = run_command("peers", "ls", home=ben.home)
        assert "This box is revoked" in done.stderr and "sold" in done.stderr
        doctor = run_command("peers", "doctor", home=ben.home, check=False)
        assert doctor.returncode == 1 and "this box is revoked" in doctor.stdout
        run_command("peers", "leave", "--yes", home=ben.home)
        assert own()["state"] == "alone"
        assert "revoked" not in run_command("peers", "ls", home=ben.home).stderr
        ben.peers("join", anna.invite())
        wait_until(lambda: ben.sees("anna") and own()["state"] == "member", "it to be let in again")
    finally:
        anna.end()
        ben.end()
