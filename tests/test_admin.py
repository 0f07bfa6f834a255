"""`/v1/admin/`: accounts and keys over HTTP."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import UNDRAFTED, Box, StartBox, wait_until
from tests.support.streamed_chat import StreamedChat

FAKE = ("--model", "fake:1=fake:0", "--model", "slow:1=fake:20")
DEFAULTS: dict[str, Any] = {
    "scopes": ["inference", "usage", "receipts"], "models": [], "networks": [], "rpm": None,
    "tpm": None, "max_parallel": None, "max_queue": 0, "budget": None, "weight": 1.0,
    "lenient": False, "strict": False, "peers": [], "routing": None, "audit": "on", "prices": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(*FAKE, config=UNDRAFTED)


def call(box: Box, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
    return box.http(method, f"/v1/admin/{path}", json=body, **more)


def ask(box: Box, method: str, path: str, body: Any = None, **more: Any) -> dict[str, Any]:
    answer = call(box, method, path, body, **more)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    assert made["request_id"] == answer.headers["x-request-id"]
    return made


def in_days(days: float) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).isoformat()


# -- accounts --------------------------------------------------------------------------------------


def test_the_life_of_an_account(box: Box) -> None:
    made = ask(box, "POST", "accounts", {"name": "alice", "password": "a good password"})
    assert (made["role"], made["has_password"], made["keys"]) == ("member", True, 0)
    assert datetime.fromisoformat(made["created_at"])
    for name in ("alice", made["id"]):
        assert ask(box, "GET", f"accounts/{name}")["id"] == made["id"]
    changed = ask(box, "PATCH", "accounts/alice", {"role": "admin", "password": None})
    assert (changed["role"], changed["has_password"]) == ("admin", False)
    key = ask(box, "POST", "keys", {"account": "alice", "policy": {"scopes": ["admin"]}})
    assert call(box, "GET", "accounts", key=key["key"]).status_code == 200
    refused = call(box, "PATCH", "accounts/alice", {"role": "member"})
    assert refused.status_code == 409 and "'admin'" in refused.json()["error"]["message"]
    removed = ask(box, "DELETE", "accounts/alice")
    assert removed["deleted"] is True and removed["id"] == made["id"]
    assert call(box, "GET", "accounts", key=key["key"]).status_code == 401
    assert call(box, "GET", "accounts/alice").status_code == 404
    names = [one["name"] for one in run_command_json("accounts", "ls", home=box.home)]
    assert "alice" not in names


def test_accounts_come_in_pages_by_name(box: Box) -> None:
    for name in ("zz1", "zz2", "zz3"):
        ask(box, "POST", "accounts", {"name": name})
    first = ask(box, "GET", "accounts", params={"after": "zz", "limit": 2})
    assert [one["name"] for one in first["data"]] == ["zz1", "zz2"]
    assert first["has_more"] is True and first["object"] == "list"
    last = ask(box, "GET", "accounts", params={"after": "zz2", "limit": 2})
    assert [one["name"] for one in last["data"]] == ["zz3"] and last["has_more"] is False


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_made_with_all_that_the_command_can_say(box: Box) -> None:
    policy = {
        "scopes": ["inference", "usage"], "models": ["fake:*"], "networks": ["127.0.0.0/8"],
        "rpm": 60, "tpm": 9000, "max_parallel": 2, "max_queue": 5,
        "budget": {"amount": "10", "period": "30d"}, "weight": 2.0, "lenient": True, "strict": True,
        "peers": ["kitchen"], "routing": "cheapest", "audit": "off",
        "prices": {"fake:*": {"prompt": "0.1", "cached": "0.05", "completion": "0.2"}, "*": "1"},
    }  # fmt: skip
    expires = in_days(30)
    made = ask(box, "POST", "keys", {"name": "n", "policy": policy, "expires_at": expires})
    assert made["policy"] == policy
    assert (made["name"], made["account"], made["state"]) == ("n", "n", "active")
    assert made["spent"] == "0"
    expiry = datetime.fromisoformat(made["expires_at"])
    assert abs(expiry - datetime.fromisoformat(expires)) < timedelta(milliseconds=2)
    by_command = run_command_json(
        "keys", "create", "--name", "n", "--scope", "inference", "--scope", "usage",
        "--model", "fake:*", "--network", "127.0.0.0/8", "--rpm", "60", "--tpm", "9000",
        "--max-parallel", "2", "--max-queue", "5", "--budget", "10 per 30d", "--weight", "2",
        "--lenient", "--strict", "--peer", "kitchen", "--policy", "cheapest",
        "--audit", "off", "--price", "fake:*=0.1/0.05/0.2", "--price", "*=1", "--expires", "30d",
        home=box.home,
    )  # fmt: skip
    assert by_command["policy"] == policy
    assert by_command.keys() == made.keys() - {"request_id"}
    # What is told of a key is told the same way everywhere, and the secret never again.
    shown = ask(box, "GET", f"keys/{made['id']}")
    del shown["request_id"]
    assert shown == {k: v for k, v in made.items() if k not in ("key", "request_id")}
    assert run_command_json("keys", "show", made["id"], home=box.home) == shown
    assert shown in ask(box, "GET", "keys")["data"]
    assert made["key"] not in json.dumps(ask(box, "GET", "keys"))
    assert ask(box, "POST", "keys", {})["policy"] == DEFAULTS


def test_a_change_changes_what_it_names(box: Box) -> None:
    made = ask(box, "POST", "keys", {"policy": {"rpm": 60, "budget": {"amount": "1"}}})
    path = f"keys/{made['id']}"
    changed = ask(box, "PATCH", path, {"policy": {"tpm": 100, "budget": None}})
    assert changed["policy"] == {**DEFAULTS, "rpm": 60, "tpm": 100}
    changed = ask(box, "PATCH", path, {"name": "other", "expires_at": in_days(1)})
    assert changed["policy"]["tpm"] == 100 and changed["name"] == "other"
    changed = ask(box, "PATCH", path, {"policy": {"rpm": None, "tpm": None}, "expires_at": None})
    assert changed["policy"] == DEFAULTS
    assert (changed["name"], changed["expires_at"]) == ("other", None)
    changed = ask(box, "PATCH", path, {"blocked": "unpaid"})
    assert (changed["state"], changed["blocked"]) == ("blocked", "unpaid")
    refused = box.http("GET", "/v1/models", key=made["key"])
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "key_blocked"
    assert "unpaid" in refused.json()["error"]["message"]
    assert ask(box, "PATCH", path, {"blocked": None})["state"] == "active"
    assert box.http("GET", "/v1/models", key=made["key"]).status_code == 200


def test_keys_come_in_pages_newest_first(box: Box) -> None:
    made = [ask(box, "POST", "keys", {"name": "paged", "account": "owner"}) for _ in range(5)]
    found, after = [], None
    while True:
        parameters = {"limit": 2, "account": "owner"} | ({"after": after} if after else {})
        page = ask(box, "GET", "keys", params=parameters)
        assert {one["account"] for one in page["data"]} == {"owner"}
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = found[-1]
    assert found == sorted(set(found), reverse=True)
    assert {one["id"] for one in made} <= set(found)
    whole = ask(box, "GET", "keys", params={"limit": 1000})["data"]
    assert found == [one["id"] for one in whole if one["account"] == "owner"]


def test_two_who_change_settings_at_once_do_not_lose_a_change(box: Box) -> None:
    """Each change that is answered with 200 is there afterwards."""
    made = ask(box, "POST", "keys", {})
    fields = ("rpm", "tpm", "max_parallel", "weight")
    done: list[str] = []

    def change(field: str) -> None:
        for _ in range(50):
            answer = call(box, "PATCH", f"keys/{made['id']}", {"policy": {field: 7}})
            assert answer.status_code in (200, 409), answer.text
            if answer.status_code == 200:
                done.append(field)
                return

    threads = [threading.Thread(target=change, args=(field,)) for field in fields]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(fields)
    policy = ask(box, "GET", f"keys/{made['id']}")["policy"]
    assert [policy[field] for field in fields] == [7] * 4


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "loc"),
    [
        ("POST", "keys", {"nmae": "x"}, 422, ["body", "nmae"]),
        ("POST", "keys", {"policy": {"rmp": 1}}, 422, ["body", "policy", "rmp"]),
        ("POST", "keys", {"policy": {"rpm": 0}}, 422, ["body", "policy", "rpm"]),
        ("POST", "keys", {"policy": {"scopes": ["king"]}}, 422, ["body", "policy", "scopes", 0]),
        ("POST", "keys", {"policy": {"networks": ["here"]}}, 422, ["body", "policy"]),
        ("POST", "keys", {"policy": {"budget": {"amount": "x"}}}, 422, ["body", "policy"]),
        ("POST", "keys", {"expires_at": "2020-01-01T00:00:00Z"}, 422, ["body", "expires_at"]),
        ("POST", "keys", {"expires_at": "9999-12-31T23:59:59-12:00"}, 422, ["body", "expires_at"]),
        ("POST", "keys", {"expires_at": "0001-01-01T00:00:00+12:00"}, 422, ["body", "expires_at"]),
        ("POST", "keys", {"expires_at": "tomorrow"}, 422, ["body", "expires_at"]),
        ("POST", "keys", {"name": "a\u001b[31mb"}, 422, ["body", "name"]),
        ("POST", "keys", {"account": "nobody"}, 404, None),
        ("POST", "keys", [], 422, ["body"]),
        ("PATCH", "keys/KEY", {"policy": {"rpm": "x"}}, 422, ["body", "policy", "rpm"]),
        ("PATCH", "keys/KEY", {"policy": {"x": 1}}, 422, ["body", "policy", "x"]),
        ("PATCH", "keys/KEY", {"policy": {"scopes": ["admin"]}}, 422, ["body", "policy", "scopes"]),
        ("PATCH", "keys/KEY", {"blocked": ""}, 422, ["body", "blocked"]),
        ("PATCH", "keys/KEY?now=true", {"name": "x"}, 422, ["query", "now"]),
        ("POST", "keys/KEY/revoke?now=maybe", None, 422, ["query", "now"]),
        ("POST", "keys/KEY/revoke?when=now", None, 422, ["query", "when"]),
        ("POST", "keys/KEY/rotate", {"overlap": "-1h"}, 422, ["body", "overlap"]),
        ("POST", "keys/KEY/rotate", {"overlap": "soon"}, 422, ["body", "overlap"]),
        ("GET", "keys/key_nothing", None, 404, None),
        ("GET", "keys/sk-pnv-", None, 404, None),
        ("GET", "keys?limit=0", None, 422, ["query", "limit"]),
        ("GET", "keys?account=nobody", None, 404, None),
        ("DELETE", "keys/KEY", None, 405, None),
        ("POST", "accounts", {"name": "A B"}, 422, ["body", "name"]),
        ("POST", "accounts", {"name": "owner"}, 409, None),
        ("POST", "accounts", {"name": "x", "role": "king"}, 422, ["body", "role"]),
        ("POST", "accounts", {"name": "x", "password": "short"}, 422, ["body", "password"]),
        ("PATCH", "accounts/owner", {"role": "member"}, 409, None),
        ("DELETE", "accounts/owner", None, 409, None),
        ("DELETE", "accounts/acct_owner", None, 409, None),
        ("GET", "nothing", None, 404, None),
    ],
)
def test_an_invalid_admin_request_gets_the_common_error_object(
    box: Box, method: str, path: str, body: Any, status: int, loc: Any
) -> None:
    key = ask(box, "GET", "keys", params={"limit": 1})["data"][0]
    if "KEY" in path:
        key = ask(box, "POST", "keys", {})
    answer = call(box, method, path.replace("KEY", key["id"]), body)
    assert answer.status_code == status, answer.text
    made = answer.json()
    assert set(made) == {"error", "detail"} and "request_id" not in answer.text
    assert set(made["error"]) == {"message", "type", "param", "code"}
    if loc is not None:
        assert made["detail"][0]["loc"] == loc
    if "KEY" in path:
        after = ask(box, "GET", f"keys/{key['id']}")
        assert after["state"] == "active" and after["policy"] == DEFAULTS


def test_only_the_scope_admin_lets_one_in(box: Box) -> None:
    paths = [("GET", "keys"), ("POST", "keys"), ("GET", "accounts"), ("GET", "audit")]
    scopes = ["inference", "usage", "receipts"]
    plain = ask(box, "POST", "keys", {"policy": {"scopes": scopes}})["key"]
    admin = ask(box, "POST", "keys", {"policy": {"scopes": ["admin"]}})["key"]
    run = json.loads((box.home / "run.json").read_text())["token"]
    for method, path in paths:
        assert call(box, method, path, {}, key=plain).status_code == 403
        assert call(box, method, path, {}, key="").status_code == 401
        assert call(box, method, path, {}, key=admin).status_code == 200
        assert call(box, method, path, {}, key=run).status_code == 200
    last = ask(box, "GET", "audit", params={"limit": 1})["data"][0]
    assert (last["action"], last["actor"]) == ("key.create", "local")


# -- now -------------------------------------------------------------------------------------------


def running_stream(box: Box, key: str) -> StreamedChat:
    stream = StreamedChat(box, "slow:1", 4000, key=key)
    stream.wait_for_text(4)
    return stream


def check_stopped(box: Box, stream: StreamedChat, code: str) -> None:
    stream.join()
    assert stream.error["code"] == code and not stream.done

    def receipt() -> Any:
        answer = box.http("GET", f"/v1/receipts/{stream.request_id}")
        return answer.status_code == 200 and json.loads(answer.json()["signed_receipt"])

    found = wait_until(receipt, "the receipt")
    assert found["finish_reason"] == "cancelled"
    assert 0 < found["usage"]["completion_tokens"] < 4000


def no_error_is_counted(box: Box, made: dict[str, Any], code: str) -> None:
    """For what the operator has ordered; the next request's own refusal is, and comes after it."""

    def errors(key: str) -> int:
        report = box.http("GET", "/v1/usage", params={"group_by": "key"}).json()
        return sum(one["errors"].get(code, 0) for one in report["data"] if one["key"] == key)

    before = errors("")
    assert box.http("GET", "/v1/models", key=made["key"]).json()["error"]["code"] == code
    wait_until(lambda: errors("") > before, "the next refusal to be counted")
    assert errors(made["id"]) == 0


def revoke_by_http(box: Box, key_id: str) -> None:
    assert ask(box, "POST", f"keys/{key_id}/revoke", params={"now": "true"})["stopped"] == 1


def revoke_by_command(box: Box, key_id: str) -> None:
    done = run_command("keys", "revoke", key_id, "--now", home=box.home)
    assert "1 running" in done.stderr


def block_by_http(box: Box, key_id: str) -> None:
    stopped = ask(box, "PATCH", f"keys/{key_id}?now=true", {"blocked": "unpaid"})["stopped"]
    assert stopped == 1


def block_by_command(box: Box, key_id: str) -> None:
    done = run_command("keys", "edit", key_id, "--block", "unpaid", "--now", home=box.home)
    assert "1 running" in done.stderr


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (revoke_by_http, "invalid_api_key"),
        (revoke_by_command, "invalid_api_key"),
        (block_by_http, "key_blocked"),
        (block_by_command, "key_blocked"),
    ],
)
def test_now_stops_the_running_streams_of_that_key_alone(box: Box, stop: Any, code: str) -> None:
    made, other = (ask(box, "POST", "keys", {}) for _ in range(2))
    stream, others = running_stream(box, made["key"]), running_stream(box, other["key"])
    stop(box, made["id"])
    check_stopped(box, stream, code)
    no_error_is_counted(box, made, code)
    others.wait_for_text(len(others.text) + 4)
    told = run_command_json("audit", "--target", made["id"], home=box.home)
    assert len(told) == 2  # made, and stopped once
    ask(box, "POST", f"keys/{other['id']}/revoke", params={"now": "true"})
    others.join()


def test_without_now_a_running_stream_goes_on(box: Box) -> None:
    made = ask(box, "POST", "keys", {})
    stream = running_stream(box, made["key"])
    assert "stopped" not in ask(box, "POST", f"keys/{made['id']}/revoke")
    stream.wait_for_text(len(stream.text) + 4)
    assert box.http("GET", "/v1/models", key=made["key"]).status_code == 401
    revoke_by_http(box, made["id"])  # it is not too late
    check_stopped(box, stream, "invalid_api_key")


def test_all_the_streams_of_a_key_end(box: Box) -> None:
    made = ask(box, "POST", "keys", {})
    # Some speak while they are stopped; and none may end before the last has begun.
    streams = [StreamedChat(box, "slow:1", 4000, key=made["key"]) for _ in range(16)]
    for stream in streams:
        stream.wait_for_text()
    assert ask(box, "POST", f"keys/{made['id']}/revoke?now=true")["stopped"] == 16
    for stream in streams:
        check_stopped(box, stream, "invalid_api_key")


def test_a_request_whose_prompt_is_still_being_read_is_stopped_too(new_box: Any) -> None:
    """A key with `tpm` waits for the engine before it is admitted, and the engine is not loaded."""
    box = new_box(*FAKE)
    made = ask(box, "POST", "keys", {"policy": {"tpm": 100_000}})
    statuses: list[int] = []

    def request() -> None:
        body = {"model": "slow:1", "messages": [{"role": "user", "content": "hi"}]}
        path = "/v1/chat/completions"
        statuses.append(box.http("POST", path, key=made["key"], json=body).status_code)

    thread = threading.Thread(target=request)
    thread.start()
    wait_until(box.engines, "the engine to be started")
    ask(box, "POST", f"keys/{made['id']}/revoke?now=true")
    thread.join(180)
    assert statuses == [401]
