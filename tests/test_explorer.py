"""The explorer: who sees which receipts, what the public does not see, and its pages."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from pinaivu_box.receipts.receipt import Price
from pinaivu_box.receipts.verify import LogPolicy, verify_receipt
from pinaivu_box.server.explorer_receipt import ExplorerReceipt, explorer_receipt
from pinaivu_box.server.pages.explorer import percent
from pinaivu_box.store.requests import StoredReceipt
from tests.support import receipt_vectors as made
from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command_json
from tests.support.log_vectors import WITNESSES, entry_proof_of, log_vectors
from tests.support.log_vectors import document as log_document
from tests.support.pages import logged_in, make_account, make_owner, visitor
from tests.support.process_box import Box, StartBox, wait_until

KEY_NAME = "key-name-of-ada"
OTHER_NODE = made.PEER.node_id
HTML = {"accept": "text/html"}


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    """It writes its configuration anew for what is public, and reloads it."""
    return module_box("--model", f"{FAKE}=fake:1")


class Ada:
    """An account with a password, a key with a name, and an answered request."""

    def __init__(self, box: Box) -> None:
        make_account(box.home, "ada")
        make_account(box.home, "bob")
        make_owner(box.home)
        created = run_command_json(
            "keys", "create", "--name", KEY_NAME, "--account", "ada", home=box.home
        )
        self.key = str(created["key"])
        chat = {"model": FAKE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        answer = box.http("POST", "/v1/chat/completions", key=self.key, json=chat)
        self.request_id = str(answer.json()["request_id"])
        path = f"/v1/receipts/{self.request_id}"
        self.receipt: dict[str, Any] = box.http("GET", path, key=self.key).json()


@pytest.fixture(scope="module")
def ada(box: Box) -> Ada:
    return Ada(box)


def public(box: Box, access: str) -> None:
    """Set `[explorer] access` of the running box."""
    (box.home / "config.toml").write_text(f'[explorer]\naccess = "{access}"\n')
    assert box.http("POST", "/v1/admin/reload").status_code == 200


@pytest.fixture
def public_box(box: Box, ada: Ada) -> Iterator[Box]:
    public(box, "public")
    yield box
    public(box, "login")


# -- who sees what -------------------------------------------------------------------------------


def test_an_account_sees_its_receipts_and_an_admin_all(box: Box, ada: Ada) -> None:
    path = f"/v1/explorer/receipts/{ada.request_id}"
    seen = box.http("GET", path, key=ada.key).json()
    assert seen["node"]["id"] == seen["coordinator"]["id"]
    assert seen["model"] == FAKE and seen["usage"]["completion_tokens"] == 5
    assert seen["receipt"]["signed_receipt"] == ada.receipt["signed_receipt"]
    assert all(check["ok"] for check in seen["checks"])
    assert box.http("GET", path).json() == seen  # the first key is an admin's
    for page, reader in (
        ("ada", logged_in(box.url, "ada")),
        ("owner", logged_in(box.url, "owner")),
    ):
        with reader as client:
            shown = client.get(f"/explorer/r/{ada.request_id}", headers=HTML)
            assert shown.status_code == 200, page
            assert ada.request_id in client.get("/explorer", headers=HTML).text


def test_where_a_receipt_is_in_the_log_is_shown(box: Box, ada: Ada) -> None:
    path = f"/v1/explorer/receipts/{ada.request_id}"
    seen = box.http("GET", path, key=ada.key).json()
    log = seen["log"]
    assert log["origin"].startswith(f"pinaivu/log/{seen['coordinator']['id']}/")
    assert 0 <= log["index"] < log["size"] and log["witnesses"] == []
    checks = [check["name"] for check in seen["checks"]]
    assert checks[-3:] == ["inclusion", "checkpoint signature", "witnesses"]
    with logged_in(box.url, "ada") as client:
        page = client.get(f"/explorer/r/{ada.request_id}", headers=HTML).text
        file = client.get(f"/explorer/r/{ada.request_id}/receipt.json").content
    assert f"{log['index']} of {log['size']} (the first is 0)" in page
    assert log["origin"] in page and "None has cosigned this checkpoint." in page
    assert all(check.ok for check in verify_receipt(file, log=LogPolicy(required=True)))


def test_witnesses_are_shown_and_a_wrong_proof_is_not() -> None:
    right = entry_proof_of(3, 7, WITNESSES)
    view, _ = shown(log_document(None), to_public=False, inclusion=str(right))
    assert view.log is not None
    assert [one.box.id for one in view.log.witnesses] == [w.node_id for w in WITNESSES]
    assert view.log.witnesses[0].cosigned_at == "2026-11-30T15:00:15.000Z"
    forged = str(json.loads(log_vectors()["log_a_witness_in_anothers_name"])["inclusion"])
    for text in ("x", str(right).replace("index 3", "index three"), forged):
        view, _ = shown(log_document(None), to_public=False, inclusion=text)
        assert view.log is None and not all(check.ok for check in view.checks)


def test_anothers_receipt_cannot_be_told_from_none(box: Box, ada: Ada) -> None:
    unknown = ada.request_id[:-4] + "zzzz"
    with logged_in(box.url, "bob") as bob:
        for path in ("/v1/explorer/receipts/{}", "/explorer/r/{}", "/explorer/r/{}/receipt.json"):
            hidden = bob.get(path.format(ada.request_id))
            none = bob.get(path.format(unknown))
            assert (hidden.status_code, none.status_code) == (404, 404), path
            assert hidden.text.replace(ada.request_id, unknown) == none.text
        assert ada.request_id not in bob.get("/explorer", headers=HTML).text


def test_without_a_login_there_is_nothing(box: Box, ada: Ada) -> None:
    with visitor(box.url) as client:
        for path in ("/explorer", f"/explorer/r/{ada.request_id}", "/explorer/network"):
            sent = client.get(path, headers=HTML)
            assert sent.status_code in (302, 303, 307), path
            assert "/login" in sent.headers["location"]
        for path in (f"/v1/explorer/receipts/{ada.request_id}", "/v1/explorer/network"):
            assert client.get(path).status_code == 401, path


def test_a_key_needs_the_scope(box: Box, ada: Ada) -> None:
    key = run_command_json(
        "keys", "create", "--account", "ada", "--scope", "inference", home=box.home
    )["key"]
    for path in (f"/v1/explorer/receipts/{ada.request_id}", "/v1/explorer/network"):
        assert box.http("GET", path, key=key).status_code == 403


@pytest.mark.parametrize(
    "name",
    [
        "..", "%2e%2e%2f%2e%2e%2fadmin", "req_..%2f..%2fetc%2fpasswd", "req_%00", "x" * 3000,
        "req_' OR 1=1 --", "<script>alert(1)</script>", "req_%0d%0aset-cookie:%20a=b", "%ff%fe",
    ],
)  # fmt: skip
def test_a_path_with_tricks_finds_nothing(box: Box, ada: Ada, name: str) -> None:
    with logged_in(box.url, "owner") as client:
        for path in ("/explorer/r/{}", "/explorer/r/{}/receipt.json", "/v1/explorer/receipts/{}"):
            found = client.get(path.format(name), headers=HTML)
            assert found.status_code == 404 or found.url.path != path.format(name)
            is_html = found.headers["content-type"].startswith("text/html")
            assert not is_html or "<script>alert" not in found.text
            assert "set-cookie" not in found.headers
        shown = client.get("/explorer", params={"id": name}, headers=HTML)
        assert "<script>alert" not in shown.text


def test_the_search_leads_to_the_receipt(box: Box, ada: Ada) -> None:
    with logged_in(box.url, "ada") as client:
        for typed in (ada.request_id, f"  {ada.request_id.upper()} "):
            sent = client.get("/explorer", params={"id": typed})
            assert sent.status_code == 303
            assert sent.headers["location"] == f"/explorer/r/{ada.request_id}"
        wrong = client.get("/explorer", params={"id": "req_1"})
        assert wrong.status_code == 200 and "not a request_id" in wrong.text


# -- what is shown -------------------------------------------------------------------------------


def test_the_file_of_the_page_verifies_and_has_no_opening(box: Box, ada: Ada) -> None:
    with logged_in(box.url, "ada") as client:
        file = client.get(f"/explorer/r/{ada.request_id}/receipt.json")
    assert "attachment" in file.headers["content-disposition"]
    assert all(check.ok for check in verify_receipt(file.content))
    without = {name: value for name, value in ada.receipt.items() if name != "opening"}
    assert json.loads(file.content) == without
    assert "opening" in ada.receipt


def test_names_of_keys_prompts_and_openings_are_nowhere(public_box: Box, ada: Ada) -> None:
    nonces = re.findall(r'"nonce": ?"([0-9a-f]{64})"', json.dumps(ada.receipt["opening"]))
    assert nonces
    paths = (
        "/explorer", "/explorer/network", f"/explorer/r/{ada.request_id}",
        f"/explorer/r/{ada.request_id}/receipt.json", "/v1/explorer/network",
        f"/v1/explorer/receipts/{ada.request_id}",
    )  # fmt: skip
    with visitor(public_box.url) as anybody, logged_in(public_box.url, "owner") as owner:
        for client in (anybody, owner):
            for path in paths:
                answer = client.get(path)
                assert answer.status_code == 200, path
                for secret in (KEY_NAME, *nonces, "opening"):
                    assert secret not in answer.text.replace("openings", ""), (path, secret)


def test_the_public_sees_a_receipt_whose_id_it_knows_and_no_list(public_box: Box, ada: Ada) -> None:
    with visitor(public_box.url) as anybody:
        assert ada.request_id not in anybody.get("/explorer").text
        seen = anybody.get(f"/v1/explorer/receipts/{ada.request_id}").json()
        assert seen["withheld"] is None  # nothing in it is about other boxes
        assert verify_receipt(json.dumps(seen["receipt"]).encode())[1].ok
        assert "candidates" not in seen["route"]
        assert anybody.get(f"/v1/receipts/{ada.request_id}").status_code == 401


def shown(
    document: bytes, *, to_public: bool, inclusion: str | None = None
) -> tuple[ExplorerReceipt, str]:
    fields = json.loads(document)
    stored = StoredReceipt(
        fields["signed_receipt"].encode(), bytes.fromhex(fields["coordinator_signature"]), b"{}"
    )
    names = {made.OWN.node_id: "here"}
    view = explorer_receipt(stored, names, public=to_public, inclusion=inclusion)
    return view, msgspec.json.encode(view).decode()


def routed(*others: dict[str, Any]) -> dict[str, Any]:
    own = {"node_id": made.OWN.node_id, "score": 0.91, "cost": "123456789", "expected_ms": 777}
    return {
        "policy": "balance", "chosen": made.OWN.node_id, "reason": "best", "eligible": 2,
        "candidates": [own, *others], "left_out": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    "document",
    [
        made.document(made.receipt(made.proof(), routing=routed(
            {"node_id": OTHER_NODE, "score": 0.5375, "cost": "987654321", "expected_ms": 4321}
        ))),
        made.document(made.receipt(made.proof(), routing=routed(
            {"node_id": OTHER_NODE, "why_not": "asks for USD, not EUR"}
        ))),
        made.document(made.receipt(made.proof(
            made.PEER, price=Price("EUR", "0.5375", "0.5375", "987654321")
        ))),
        made.document(made.receipt(made.proof(), routing={
            **routed(), "left_out": {"asks for USD, not EUR": 1}
        })),
        made.document(made.receipt(made.proof(), routing={
            **routed(), "legs": [routed({"node_id": OTHER_NODE, "score": 0.5375, "cost": "1",
                                         "expected_ms": 4321})]
        })),
        made.document(made.receipt(made.upstream_leg(upstream="asks for USD"))),
    ],
    ids=["score", "refusal", "price", "left out", "further leg", "upstream"],
)  # fmt: skip
def test_the_public_does_not_see_what_a_receipt_says_of_others(document: bytes) -> None:
    view, text = shown(document, to_public=True)
    assert view.receipt is None and view.withheld
    assert all(check.ok for check in view.checks)
    for secret in ("0.5375", "987654321", "4321", "asks for USD", "signed_receipt"):
        assert secret not in text
    full, _ = shown(document, to_public=False)
    assert full.receipt is not None
    assert all(check.ok for check in verify_receipt(msgspec.json.encode(full.receipt)))


def test_why_a_box_was_chosen_is_said(box: Box, ada: Ada) -> None:
    other = {"node_id": OTHER_NODE, "score": 0.5, "cost": "1500000", "expected_ms": 400}
    view, _ = shown(
        made.document(made.receipt(made.proof(), routing=routed(other))), to_public=False
    )
    assert "best score" in view.route.why
    assert [one.cost for one in view.route.candidates] == ["0.123456789", "0.0015"]
    own = {**routed(), "eligible": 1}
    view, _ = shown(made.document(made.receipt(made.proof(), routing=own)), to_public=False)
    assert "only one" in view.route.why


def test_parts_of_100_percent_are_not_rounded_up() -> None:
    assert percent(0, 0) == "-"
    assert percent(86_400, 86_400) == "100 %"
    assert percent(86_399, 86_400) == "99.99 %"
    assert percent(0, 60) == "0.00 %"


# -- the network ---------------------------------------------------------------------------------


def test_the_network_has_boxes_models_capacity_and_no_prices(public_box: Box) -> None:
    with visitor(public_box.url) as anybody:
        network = anybody.get("/v1/explorer/network").json()
        page = anybody.get("/explorer/network", headers=HTML)
    (own,) = network["boxes"]
    assert own["state"] == "this box"
    (model,) = [one for one in network["models"] if one["id"] == FAKE]
    assert model["sequences"] >= model["sequences_free"] >= 0
    assert network["uptime"][-1]["known"] >= network["uptime"][-1]["running"]
    assert "price" not in json.dumps(network)
    assert page.status_code == 200 and FAKE in page.text


def test_an_engine_that_dies_is_an_incident(box: Box, ada: Ada) -> None:
    assert box.chat(model=FAKE, max_tokens=2).status_code == 200
    (engine,) = box.engines()
    os.kill(engine["pid"], signal.SIGKILL)

    def incident() -> dict[str, Any] | None:
        found = box.http("GET", "/v1/explorer/network").json()["incidents"]
        return next((one for one in found if one["kind"] == "engine"), None)

    died = wait_until(incident, "the incident")
    assert died["subject"] == FAKE and died["ended_at"] == died["began_at"]
    assert 'pinaivu_incidents_total{kind="engine"} 1.0' in box.http("GET", "/metrics").text
    with logged_in(box.url, "ada") as client:
        assert "An engine died" in client.get("/explorer/network", headers=HTML).text
