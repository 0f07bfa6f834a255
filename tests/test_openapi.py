"""`/openapi.json`: what it says of credentials and bodies."""

from __future__ import annotations

from typing import Any

import pytest

from pinaivu_box.server.endpoints import ENDPOINTS
from pinaivu_box.server.openapi import specification


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return specification(ENDPOINTS)


def test_changes_by_a_session_need_its_token_too(api: dict[str, Any]) -> None:
    keys = api["paths"]["/v1/account/keys"]
    assert keys["post"]["security"] == [{"key": []}, {"session": [], "csrf": []}]
    assert keys["get"].get("security", api["security"]) == [{"key": []}, {"session": []}]
    schemes = api["components"]["securitySchemes"]
    assert (schemes["session"]["in"], schemes["csrf"]["in"]) == ("cookie", "header")
    assert schemes["csrf"]["name"] == "x-csrf-token"


def test_what_needs_no_credential_says_so(api: dict[str, Any]) -> None:
    assert api["paths"]["/api/version"]["get"]["security"] == []
    with_session: dict[str, list[str]] = {"session": [], "csrf": []}
    assert api["paths"]["/v1/session"]["post"]["security"] == [{}, with_session]


def test_an_import_has_a_body(api: dict[str, Any]) -> None:
    body = api["paths"]["/v1/conversations/import"]["post"]["requestBody"]
    content = body["content"]["application/json"]
    assert body["content"]["text/markdown"] == {"schema": {"type": "string"}}
    name = content["schema"]["$ref"].rsplit("/", 1)[1]
    assert "conversations" in api["components"]["schemas"][name]["properties"]
