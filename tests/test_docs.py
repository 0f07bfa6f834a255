"""`/docs` draws every operation of `/openapi.json`: its script, run by Node on a stand-in for a
browser's document."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from importlib import resources
from typing import Any

import pytest

from pinaivu_box.server.endpoints import ENDPOINTS
from pinaivu_box.server.openapi import specification

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node here")
# As much of a document as a page could use; whatever else it asks for fails, as it should.
BROWSER = """
class Node {
  constructor(tag) { this.tag = tag; this.className = ""; this.children = []; this.own = ""; }
  set textContent(text) { this.own = String(text); this.children = []; }
  get textContent() { return this.own + this.children.map((c) => c.textContent ?? c).join(" "); }
  append(...nodes) { this.children.push(...nodes); }
  insertRow() { const row = new Node("tr"); this.append(row); return row; }
  insertCell() { const cell = new Node("td"); this.append(cell); return cell; }
  tree() {
    const inside = this.children.map((c) => c.tree ? c.tree() : String(c));
    return { tag: this.tag, kind: this.className, text: this.own, children: inside };
  }
}
const main = new Node("main");
globalThis.document = { createElement: (tag) => new Node(tag), querySelector: () => main };
const api = JSON.parse(require("fs").readFileSync(0, "utf8"));
globalThis.fetch = async () => ({ json: async () => api });
setTimeout(() => console.log(JSON.stringify(main.tree())), 0);
"""


def drawn(api: dict[str, Any]) -> list[dict[str, Any]]:
    """The operations that the page shows, each as what is in it."""
    page = resources.files("pinaivu_box.server").joinpath("docs.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    done = subprocess.run(
        ["node", "-e", BROWSER + script], input=json.dumps(api), text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    main = json.loads(done.stdout)
    assert not main["text"], main["text"]  # an error is put there
    return list(main["children"])


def text(node: Any) -> str:
    if isinstance(node, str):
        return node
    return f"{node['text']} {' '.join(map(text, node['children']))}"


def tags(node: Any) -> set[str]:
    if isinstance(node, str):
        return set()
    return {node["tag"]}.union(*map(tags, node["children"]))


def operations(api: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, one) for path, ms in api["paths"].items() for method, one in ms.items()]


def test_every_operation_is_drawn_with_all_that_it_takes_and_gives() -> None:
    api = specification(ENDPOINTS)
    found = drawn(api)
    assert len(found) == len(operations(api))
    for box, (method, path, one) in zip(found, operations(api), strict=True):
        shown = text(box)
        assert all(part in shown for part in (method, path, one["summary"]))
        assert "pre" not in tags(box)  # which is for what cannot be drawn
        for parameter in one["parameters"]:
            assert parameter["name"] in shown
        contents = [one.get("requestBody", {}).get("content", {})]
        contents += [answer["content"] for answer in one["responses"].values()][:1]
        for content in contents:
            for kind, media in content.items():
                assert kind == "application/json" or kind in shown
                if "$ref" in media["schema"]:
                    name = media["schema"]["$ref"].split("/")[-1]
                    assert name in shown
                    for field in api["components"]["schemas"][name].get("properties", {}):
                        assert field in shown


ODD: dict[str, dict[str, Any]] = {
    "no answer": {"summary": "x", "responses": {}},
    "no content": {"summary": "x", "responses": {"204": {"description": "done"}}},
    "bytes": {
        "summary": "x",
        "requestBody": {"content": {"application/octet-stream": {}}},
        "responses": {"200": {"content": {"text/csv": {"schema": {"type": "string"}}}}},
    },
    "no schema": {"summary": "x", "responses": {"200": {"content": {"application/json": {}}}}},
    "any": {"responses": {"200": {"content": {"application/json": {"schema": True}}}}},
    "a form": {
        "summary": "x",
        "requestBody": {
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"file": {"type": "string"}}}
                }
            }
        },
        "responses": {"default": {"description": "either"}},
    },
    "a wrong reference": {
        "summary": "x",
        "responses": {
            "200": {"content": {"application/json": {"schema": {"$ref": "#/components/no"}}}}
        },
    },
    "no parameters' schemas": {"parameters": [{"name": "a", "in": "query"}], "responses": {}},
    "nonsense": {"summary": "x", "responses": {"200": None}},
}


@pytest.mark.parametrize("name", ODD)
def test_no_operation_stops_the_page(name: str) -> None:
    api = copy.deepcopy(specification(ENDPOINTS))
    api["paths"] = {"/first": {"get": ODD[name]}, **api["paths"]}
    found = drawn(api)
    assert len(found) == len(operations(api))
    assert "/first" in text(found[0]) and "pre" not in tags(found[-1])
