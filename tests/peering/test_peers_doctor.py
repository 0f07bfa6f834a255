"""What `pinaivu peers doctor` makes of what it finds: each cause told, each with what to do."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest

from pinaivu_box.amount import Prices
from pinaivu_box.config import Config
from pinaivu_box.doctor import udp
from pinaivu_box.doctor.check import Check
from pinaivu_box.doctor.peers import examine
from pinaivu_box.network.peer import (
    OfferView,
    OwnModel,
    OwnView,
    PeerView,
    RefusalView,
    UseView,
)
from pinaivu_box.peering_config import PeeringConfig
from pinaivu_box.server.admin_peers import PeerList
from pinaivu_box.store.peer_settings import PeerLimits
from pinaivu_box.transport.link import LinkView

OFFER = OfferView("m:1", "aa" * 32, 8, 8, 1000, 0, 5, 50, Prices("0", "0"))
OWN = OwnModel(**msgspec.structs.asdict(OFFER))
USE = UseView(8, 0, None, 0, None, "0", "idle", ("*",), "", open=True)
PEER = PeerView(
    id="node_" + "bb" * 32, name="ben", state="connected", why="",
    link=LinkView(True, "10.0.0.2:4002", 3.0), software="pinaivu 0.1.0", clock_ahead=0.1,
    addresses=["10.0.0.2:4002"], models=[OFFER], currency="credits", draining=False, gone=False,
    advert_age=1.0, reputation=None, admin=False, invited_by="anna", member_since=None,
    limits=PeerLimits(), use=USE,
)  # fmt: skip
LOST = {"link": None, "state": "unreachable"}


def using(**fields: Any) -> dict[str, Any]:
    return {"use": msgspec.structs.replace(USE, **fields)}


def own(*addresses: str, relay: str = "none") -> OwnView:
    return OwnView(
        "node_" + "aa" * 32, "anna", "net_", "pinaivu 0.1.0", list(addresses), relay, [OWN]
    )


def checks(
    peer: PeerView, home: Path, me: OwnView | None = None, **settings: Any
) -> dict[str, Check]:
    config = Config(peering=PeeringConfig(**settings))
    found = PeerList(me or own(), [peer])
    return {one.name: one for one in examine(home, config, found, found.data)}


def changed(**fields: Any) -> PeerView:
    return msgspec.structs.replace(PEER, **fields)


def test_all_is_well(tmp_path: Path) -> None:
    found = checks(PEER, tmp_path)
    of_peer = {name: one for name, one in found.items() if name.startswith("ben: ")}
    assert {one.state for one in of_peer.values()} == {"ok"}
    assert "direct, 10.0.0.2:4002, round trip 3 ms" in of_peer["ben: link"].found


@pytest.mark.parametrize(
    ("fields", "name", "state", "found", "todo"),
    [
        ({"state": "revoked", "link": None, "why": "anna revoked it (sold)"},
         "membership", "failed", "sold", "founder"),
        ({**LOST, "why": "Another box than node_bb answers at 10.0.0.2:4002: it has moved, or "
          "somebody is in its place; ask its operator for a new ticket."},
         "key", "failed", "Another box", "new ticket"),
        ({**LOST, "addresses": []}, "address", "failed", "none of its addresses", "ticket"),
        ({**LOST, "addresses": ["https://relay.example"]},
         "relay", "warning", "https://relay.example, but this box uses no relay", "here too"),
        ({"link": None, "state": "connecting"}, "link", "warning", "no answer yet", "wait"),
        ({"link": LinkView(False, "https://relay.example", 80.0)},
         "link", "ok", "by a relay", ""),
        ({"software": "pinaivu 0.2.0"}, "version", "ok", "this box has pinaivu 0.1.0", "update"),
        ({"clock_ahead": 86400.0}, "clock", "failed", "86400.0 s ahead", "timedatectl"),
        ({"clock_ahead": -10.0}, "clock", "warning", "10.0 s behind", "timedatectl"),
        ({"models": [msgspec.structs.replace(OFFER, digest="cc" * 32)]},
         "models", "warning", "another file there (cccccccc) than here (aaaaaaaa)", "same_name"),
        ({"models": []}, "models", "warning", "no models", "pinaivu ls"),
        ({"models": [], "advert_age": None}, "models", "warning", "no recent advert", "wait"),
        ({"limits": PeerLimits(blocked="loud")}, "limits", "warning", "loud", "--unblock"),
        ({"draining": True}, "limits", "warning", "stopping", "wait"),
        ({"models": [msgspec.structs.replace(OFFER, sequences_free=0)]},
         "limits", "warning", "busy", "wait"),
        ({"refusal": RefusalView("ben refused it: This box serves others at night.", 7)},
         "limits", "warning", "7 s ago it refused a request: This box serves", "there"),
        (using(hours="18:00-08:00", open=False),
         "limits", "warning", "only from 18:00-08:00", "peers edit ben --hours"),
        (using(models=("other:*",)), "limits", "warning", "may use other:*", "--model"),
        (using(running=8), "limits", "warning", "8 requests running here", "--max-parallel"),
        (using(tokens_per_minute=90, tokens=90), "limits", "warning", "90 tokens", "wait"),
        (using(credit_limit="5", owes="5", beyond="refuse"),
         "limits", "warning", "owes 5 of at most 5, and is not served", "ledger settle ben"),
        (using(credit_limit="5", owes="6"), "limits", "warning", "only while this box is idle",
         "--credit-limit"),
        (using(credit_limit="5", owes="4.9", tokens_per_minute=90, tokens=89, running=7),
         "limits", "ok", "no limit is reached", ""),
    ],
)  # fmt: skip
def test_each_cause_is_told_with_what_to_do(
    tmp_path: Path, fields: dict[str, Any], name: str, state: str, found: str, todo: str
) -> None:
    check = checks(changed(**fields), tmp_path)[f"ben: {name}"]
    assert check.state == state and found in check.found and todo in check.todo, check
    assert bool(check.todo) == bool(todo), check


def test_the_same_name_may_be_enough(tmp_path: Path) -> None:
    peer = changed(models=[msgspec.structs.replace(OFFER, digest="cc" * 32)])
    assert checks(peer, tmp_path, same_name=True)["ben: models"].state == "ok"


def test_addresses_of_this_box_are_checked(tmp_path: Path) -> None:
    lost = changed(**LOST, addresses=[], why="It is gone.")
    assert "this machine" in checks(lost, tmp_path, own("127.0.0.1:9"))["NAT"].found
    behind = checks(lost, tmp_path, own("192.168.255.1:9"), port=4321)["NAT"]
    assert behind.state == "warning" and "UDP port 4321" in behind.todo
    assert checks(PEER, tmp_path, own("127.0.0.1:9"))["port"].state == "failed"


def test_a_box_that_does_not_run(tmp_path: Path) -> None:
    said = "No box is running on /home: start one with 'pinaivu serve'."
    (check,) = examine(tmp_path, Config(), said, [])
    assert (check.state, check.todo) == ("failed", "start one with 'pinaivu serve'")


def test_a_port_that_nobody_has_and_one_that_says_nothing() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{mute.getsockname()[1]}"
        assert udp.ask(where, 0.2) == "silent"
    assert udp.ask(where, 5) == "closed"
    assert udp.ask("no address", 5) == "unknown name"


class Web(BaseHTTPRequestHandler):
    """Not a relay, unless `status` is 101."""

    status = 404

    def do_GET(self) -> None:
        asked = self.path == "/relay" and "iroh-relay-v2" in self.headers["Sec-WebSocket-Protocol"]
        self.send_response(self.status if asked else 400)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Web) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_relay_is_asked_whether_it_is_one(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = changed(**LOST, addresses=[web], why="It is gone.")
    nobody = "http://127.0.0.1:9/"
    for url, status, found in ((web, 404, "is not a relay (status 404)"), (nobody, 0, "refused")):
        monkeypatch.setattr(Web, "status", status)
        check = checks(lost, tmp_path, own(relay=url))["relay"]
        assert check.state == "failed" and url in check.found and found in check.found
        assert checks(PEER, tmp_path, own(relay=url))["relay"].state == "warning"  # all are linked
    monkeypatch.setattr(Web, "status", 101)
    for mine in (own(relay=web), own("10.0.0.1:1", web, relay="n0")):
        done = checks(lost, tmp_path, mine)
        assert done["relay"].state == done["ben: relay"].state == "ok", done
        assert web in done["relay"].found and web in done["ben: relay"].found
    monkeypatch.setattr(Web, "status", 404)
    assert checks(lost, tmp_path, own(relay=web))["ben: relay"].state == "failed"


def test_no_public_relay_has_answered(tmp_path: Path) -> None:
    check = checks(changed(**LOST), tmp_path, own(relay="n0"))["relay"]
    assert check.state == "failed" and "none of the public relays" in check.found and check.todo
