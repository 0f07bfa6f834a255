"""What a key may do and from where, asked of a real server."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sqlite3
from collections.abc import Callable
from typing import Any, get_type_hints

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from pinaivu_box import server
from pinaivu_box.server.endpoint import Endpoint
from pinaivu_box.server.endpoints import ENDPOINTS, access_to
from pinaivu_box.server.inference import InferenceCall
from pinaivu_box.server.json_response import JSON
from pinaivu_box.server.pages.routes import PAGES
from pinaivu_box.server.sse import EventStream
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, StartBox

FAKE = ("--model", "fake:1=fake:0", "--model", "other:1=fake:0")
CHAT = {"model": "fake:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "fake:1", "prompt": "hi", "max_tokens": 2}
# Every way of asking a model.
RUNS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/completions/input_tokens": CHAT,
    "/v1/completions": TEXT,
    "/v1/responses": {"model": "fake:1", "input": "hi", "max_output_tokens": 2},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": {k: v for k, v in CHAT.items() if k != "max_tokens"},
    "/v1/embeddings": {"model": "fake:1", "input": "hi"},
    "/v1/tokenize": {"model": "fake:1", "text": "hi"},
    "/v1/detokenize": {"model": "fake:1", "tokens": [104]},
}
READS = {
    "/v1/models": "",
    "/v1/models/fake:1": "",
    "/v1/usage": "usage",
    "/v1/receipts/REQUEST": "receipts",
    "/v1/log": "",
    "/v1/log/checkpoint": "",
    "/v1/log/consistency?from=0&to=0": "",
    "/v1/log/proof/REQUEST": "receipts",
    "/v1/log/tile/0/000.p/1": "",
    "/v1/engines": "admin",
    "/v1/admin/keys": "admin",
    "/v1/admin/accounts": "admin",
    "/v1/admin/audit": "admin",
    "/v1/admin/devices": "admin",
    "/v1/admin/upstreams": "admin",
}


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(*FAKE)


def key(box: Box, **policy: Any) -> dict[str, Any]:
    """A key of the owner's account, so that it sees the receipts of others."""
    answer = box.http("POST", "/v1/admin/keys", json={"account": "owner", "policy": policy})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def chat(box: Box, secret: str, **more: Any) -> httpx.Response:
    return box.http("POST", "/v1/chat/completions", key=secret, json={**CHAT, **more})


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    if isinstance(error, str):  # in Ollama's API
        assert answer.json()["code"] == code
        return error
    assert error["code"] == code
    return str(error["message"])


# -- scopes ----------------------------------------------------------------------------------------


PARAMETERS = {"model": "fake:1", "account": "acct_none", "key_id": "key_none", "peer": "none"}


def only_streams(endpoint: Endpoint) -> bool:
    return endpoint.media_types == [EventStream.media_type]


def address(endpoint: Endpoint) -> str:
    """Its path with values for the parameters that, but for the model, name nothing."""
    path: str = endpoint.path_format
    for name in endpoint.path_parameters:
        path = path.replace(f"{{{name}}}", PARAMETERS.get(name, "none"))
    return path


@pytest.mark.parametrize("scope", ["inference", "usage", "receipts", "account", "admin", None])
def test_each_scope_opens_its_endpoints_and_no_other(box: Box, scope: str | None) -> None:
    secret = key(box, scopes=[scope] if scope else [])["key"]
    for endpoint in ENDPOINTS:
        needed = "receipts" if endpoint.access == "explorer" else endpoint.access
        # An admin may read what is kept of others.
        opens = needed in (scope, "any key", "public", "page") or (
            scope == "admin" and needed in ("usage", "receipts")
        )
        for method in sorted(endpoint.methods or ()):
            if opens and method == "GET" and only_streams(endpoint):
                continue  # it has no end
            answer = box.http(method, address(endpoint), key=secret)
            refusal = answer.status_code in (401, 403) and "session_ended" not in answer.text
            if opens and method == "HEAD":
                continue  # without a body it does not say which of both it is
            assert refusal != opens, (method, endpoint.path, answer.text)
            if refusal and method != "HEAD":
                assert f"'{needed}'" in refused(answer, 403, "permission_denied")


def test_without_a_key_only_public_endpoints_answer(box: Box) -> None:
    for endpoint in ENDPOINTS:
        for method in sorted(endpoint.methods or ()):
            answer = box.http(method, address(endpoint), key="")
            if endpoint.path == "/v1/witness/add-checkpoint":
                assert answer.status_code == 400  # nothing was submitted
            elif endpoint.access == "public":
                named = bool(endpoint.path_parameters)  # what there is not
                assert answer.status_code == (404 if named else 200), (method, endpoint.path)
            elif endpoint.access == "page":  # it may lead to the login
                assert answer.status_code in (200, 303, 400, 404), (method, endpoint.path)
            else:
                assert answer.status_code == 401, (method, endpoint.path, answer.text)


def test_everything_below_v1_and_api_needs_a_key_and_nothing_else_does() -> None:
    assert {one.path for one in ENDPOINTS if one.access in ("public", "page")} == {
        "/api/version",
        *("/v1/session", "/v1/session/link", "/v1/signup"),  # where one has none yet
        *(one.path for one in PAGES if one.access != "account"),
        *("/health", "/readyz", "/metrics"),
        # Of witnesses: what counts is the signature of the log.
        *("/v1/witness/add-checkpoint", "/v1/witness/{origin_hash}/checkpoint"),
    }


@pytest.mark.parametrize(
    ("method", "path", "access"),
    [
        ("HEAD", "/v1/usage", "usage"),
        ("PUT", "/v1/usage", "usage"),
        ("GET", "/v1/usage/more", "usage"),
        ("GET", "/v1/admin", "admin"),
        ("GET", "/v1/admin/nothing", "admin"),
        ("DELETE", "/v1/models/fake:1", "any key"),
        ("GET", "/v1", "inference"),
        ("GET", "/v1/nothing", "inference"),
        ("POST", "/api/nothing", "public"),
        ("GET", "/nothing", "page"),
    ],
)
def test_an_unknown_path_needs_the_scope_of_its_resource(
    method: str, path: str, access: str
) -> None:
    assert access_to(method, path) == access


def is_handler(function: Callable[..., Any]) -> bool:
    """Whether it has the parameters of a handler: see `pinaivu_box.server.endpoint`."""
    types = get_type_hints(function)
    parameters = list(inspect.signature(function).parameters)
    return types.get(next(iter(parameters), "")) in (Request, InferenceCall) and all(
        name in ("query", "body") or types[name] is str for name in parameters[1:]
    )


# What handlers have in common, with the parameters of one.
SHARED = {"shown_messages", "list_lines"}


def test_every_handler_has_an_endpoint() -> None:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(server.__path__, f"{server.__name__}.")
    ]
    handlers = {
        function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.iscoroutinefunction)
        if function.__module__ == module.__name__ and name[0] != "_" and is_handler(function)
        if not name.endswith("_of") and name not in SHARED
    }
    assert handlers == {endpoint.handler for endpoint in ENDPOINTS}


def test_an_endpoint_whose_handler_takes_other_parameters_is_refused() -> None:
    async def handler(_request: Request, _name: str) -> Response:
        raise NotImplementedError

    with pytest.raises(TypeError, match="do not fit"):
        Endpoint("GET", "/v1/things/{thing}", "admin", handler)


@pytest.mark.parametrize("scope", ["inference", "usage", "receipts", "admin", None])
def test_a_scope_serves_what_it_opens(box: Box, scope: str | None) -> None:
    request_id = chat(box, box.key).json()["request_id"]
    secret = key(box, scopes=[scope] if scope else [])["key"]
    for path, body in RUNS.items():
        answer = box.http("POST", path, key=secret, json=body)
        assert answer.status_code == (200 if scope == "inference" else 403), (path, answer.text)
    for path, needed in READS.items():
        # An admin may read what is kept of others.
        opens = needed in ("", scope) or (scope == "admin" and needed in ("usage", "receipts"))
        answer = box.http("GET", path.replace("REQUEST", request_id), key=secret)
        assert answer.status_code == (200 if opens else 403), (path, answer.text)


def test_a_key_may_also_come_as_x_api_key(box: Box) -> None:
    made = key(box)
    for path, body in RUNS.items():
        answer = box.http("POST", path, key="", json=body, headers={"x-api-key": made["key"]})
        assert answer.status_code == 200, (path, answer.text)
    wrong = {"x-api-key": made["key"][:-1]}
    refused(box.http("GET", "/v1/models", key="", headers=wrong), 401, "invalid_api_key")


def test_every_list_names_its_request(box: Box) -> None:
    answered = set()
    for endpoint in ENDPOINTS:
        is_list = endpoint.method == "GET" and endpoint.summary and not endpoint.path_parameters
        if is_list and endpoint.media_types == [JSON.media_type]:
            answer = box.http("GET", endpoint.path)
            if answer.status_code == 200:
                answered.add(endpoint.path)
                assert answer.json()["request_id"] == answer.headers["x-request-id"], endpoint.path
    assert {"/v1/models", "/v1/engines", "/v1/receipts", "/v1/usage"} <= answered
    assert {
        "/v1/admin/keys",
        "/v1/admin/accounts",
        "/v1/admin/audit",
        "/v1/admin/models",
    } <= answered


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS)
def test_a_key_uses_only_the_models_that_it_may(box: Box, path: str) -> None:
    secret = key(box, models=["fake:*"])["key"]
    assert box.http("POST", path, key=secret, json=RUNS[path]).status_code == 200
    answer = box.http("POST", path, key=secret, json={**RUNS[path], "model": "other:1"})
    assert "fake:*" in refused(answer, 403, "model_not_allowed")
    streamed = {**RUNS[path], "model": "other:1", "stream": True}
    if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        refused(box.http("POST", path, key=secret, json=streamed), 403, "model_not_allowed")


def test_models_lists_only_those(box: Box) -> None:
    secret = key(box, models=["fake:*", "smollm*"])["key"]
    listed = {one["id"] for one in box.http("GET", "/v1/models", key=secret).json()["data"]}
    assert "fake:1" in listed and "other:1" not in listed
    refused(box.http("GET", "/v1/models/other:1", key=secret), 403, "model_not_allowed")
    whole = {one["id"] for one in box.http("GET", "/v1/models").json()["data"]}
    assert {"fake:1", "other:1"} <= whole


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "passes"),
    [
        (["127.0.0.0/8"], True),
        (["10.0.0.0/8"], False),
        (["10.0.0.0/8", "127.0.0.1/32"], True),
        (["::1/128"], False),
        (["0.0.0.0/0"], True),
    ],
)
def test_a_key_works_from_its_networks_alone(box: Box, networks: list[str], passes: bool) -> None:
    answer = box.http("GET", "/v1/models", key=key(box, networks=networks)["key"])
    if passes:
        assert answer.status_code == 200
    else:
        assert "127.0.0.1" in refused(answer, 403, "permission_denied")


def test_an_ipv4_client_of_an_ipv6_socket_is_of_its_ipv4_network(new_box: Any) -> None:
    try:
        box = new_box(*FAKE, "--host", "::")
    except AssertionError:
        pytest.skip("there is no IPv6 here")
    port = box.url.rsplit(":", 1)[1]
    v4, v6 = key(box, networks=["127.0.0.0/8"])["key"], key(box, networks=["::1/128"])["key"]
    for host, works, does_not in (("127.0.0.1", v4, v6), ("[::1]", v6, v4)):
        box.url = f"http://{host}:{port}"
        assert box.http("GET", "/v1/models", key=works).status_code == 200
        refused(box.http("GET", "/v1/models", key=does_not), 403, "permission_denied")


# -- rotation --------------------------------------------------------------------------------------


def test_the_old_secret_works_during_the_overlap_and_on_the_same_limits(box: Box) -> None:
    made = key(box, rpm=4)
    old = made["key"]
    new = run_command_json("keys", "rotate", made["id"], "--overlap", "1h", home=box.home)
    assert new["id"] == made["id"] and new["key"] != old
    assert [chat(box, secret).status_code for secret in (old, new["key"]) * 2] == [200] * 4
    for secret in (old, new["key"]):
        refused(chat(box, secret), 429, "rate_limit_exceeded")
    # The overlap has passed.
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        database.execute("UPDATE keys SET old_until = 1 WHERE id = ?", (made["id"],))
    answer = box.http("GET", "/v1/models", key=old)
    assert new["prefix"] in refused(answer, 401, "invalid_api_key")
    assert box.http("GET", "/v1/models", key=new["key"]).status_code == 200


def test_a_rotation_without_overlap_ends_the_old_secret_at_once(box: Box) -> None:
    made = key(box)
    path = f"/v1/admin/keys/{made['id']}/rotate"
    new = box.http("POST", path, json={"overlap": "0"}).json()["key"]
    assert box.http("GET", "/v1/models", key=new).status_code == 200
    refused(box.http("GET", "/v1/models", key=made["key"]), 401, "invalid_api_key")


def test_a_day_is_the_overlap_where_nothing_is_said(box: Box) -> None:
    rotations: tuple[Callable[[str], Any], ...] = (
        lambda key_id: box.http("POST", f"/v1/admin/keys/{key_id}/rotate").json(),
        lambda key_id: run_command_json("keys", "rotate", key_id, home=box.home),
    )
    for rotate in rotations:
        made = key(box)
        new = rotate(made["id"])
        assert made["created_at"] < new["old_until"]
        assert box.http("GET", "/v1/models", key=made["key"]).status_code == 200


# -- blocked, unreadable ---------------------------------------------------------------------------


def test_a_blocked_key_says_why_until_it_is_unblocked(box: Box) -> None:
    made = key(box)
    run_command("keys", "edit", made["id"], "--block", "the bill is open", home=box.home)
    assert "the bill is open" in refused(chat(box, made["key"]), 403, "key_blocked")
    run_command("keys", "edit", made["id"], "--unblock", home=box.home)
    assert chat(box, made["key"]).status_code == 200


def test_a_setting_that_nobody_here_knows_stops_that_key_alone(box: Box) -> None:
    """It may be a limit: to pass it over would be to let the key do what it must not."""
    made, other = key(box), key(box)
    policy = json.dumps({"rpm": 60, "only_on_sundays": True})
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        database.execute("UPDATE keys SET policy = ? WHERE id = ?", (policy, made["id"]))
    assert "newer version" in refused(chat(box, made["key"]), 403, "key_blocked")
    assert chat(box, other["key"]).status_code == 200
    states = {one["id"]: one["state"] for one in run_command_json("keys", "ls", home=box.home)}
    assert (states[made["id"]], states[other["id"]]) == ("blocked", "active")
    # A change must not drop what it cannot read.
    for change in (("--rpm", "5"), ("--unblock",)):
        run_command("keys", "edit", made["id"], *change, home=box.home, check=False)
    with sqlite3.connect(box.home / "pinaivu.db") as database:
        kept = database.execute("SELECT policy FROM keys WHERE id = ?", (made["id"],)).fetchone()
    assert kept == (policy,)
    refused(chat(box, made["key"]), 403, "key_blocked")
    run_command("keys", "revoke", made["id"], home=box.home)
    refused(chat(box, made["key"]), 401, "invalid_api_key")
