"""Requests made by schemathesis from /openapi.json, and what came of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import hypothesis
from hypothesis import HealthCheck, Phase

from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box

SECONDS = 60.0  # for one answer: longer is a hang
MODEL = "fake:1"


def fake_box(home: Path) -> Box:
    """A box whose only model answers at once, and briefly."""
    home.mkdir()
    model = f'[[model]]\nname = "{MODEL}"\npath = "fake:0"\ncontext = 256\n'
    (home / "config.toml").write_text(model)
    return Box(home).start()


class Fuzzer:
    """`failures` are requests that were answered with a 5xx that is no 503, or not at all."""

    def __init__(self, box: Box, examples: int, seed: int, tell: int = 0) -> None:
        self.failures: list[str] = []
        self.answers: Counter[tuple[str, int]] = Counter()
        self._box = box
        self._examples = examples
        self._seed = seed
        self._tell = tell
        self._client = httpx.Client(
            base_url=box.url, headers={"Authorization": f"Bearer {box.key}"}, timeout=SECONDS
        )

    def run(self) -> None:
        import schemathesis  # here: it takes a second, in every process that collects tests

        document = self._box.http("GET", "/openapi.json").json()
        _name_what_is_there(document, self._box.home)
        schema = schemathesis.openapi.from_dict(_with_a_model(document))
        for result in schema.get_all_operations():
            operation: Any = result.ok()  # type: ignore[union-attr]  # ours has no error
            for mode in (
                schemathesis.GenerationMode.POSITIVE,
                schemathesis.GenerationMode.NEGATIVE,
            ):
                self._drive(operation, mode)

    def _drive(self, operation: Any, mode: Any) -> None:
        try:
            cases = operation.as_strategy(generation_mode=mode)
            cases.validate()
        except Exception:  # there is nothing wrong to be sent to an operation without a body
            return

        @hypothesis.seed(self._seed)
        @hypothesis.settings(
            max_examples=self._examples,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=cases)
        def drive(case: Any) -> None:
            self._send(case)

        try:
            drive()
        except hypothesis.errors.Unsatisfiable:
            return

    def _send(self, case: Any) -> None:
        request = case.as_transport_kwargs(base_url=self._box.url)
        sent = {name: request.get(name) for name in ("params", "json", "data") if request.get(name)}
        content = sent.get("data") or json.dumps(sent.get("json"), default=str)
        what = f"{case.method} {case.path}"
        try:
            answer = self._client.request(
                request["method"],
                request["url"],
                params=sent.get("params"),
                content=content if case.operation.body else None,
                headers={"content-type": "application/json"},
            )
        except httpx.HTTPError as error:
            if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
                return  # never sent
            self.failures.append(f"{what}: {type(error).__name__}: {str(content)[:1000]}")
            return
        self.answers[(what, answer.status_code)] += 1
        if answer.status_code >= 500 and answer.status_code != 503:
            self.failures.append(f"{what}: {answer.status_code}: {str(content)[:1000]}")
        total = sum(self.answers.values())
        if self._tell and total % self._tell == 0:
            print(f"{time.strftime('%H:%M:%S')} {total} requests, MB: {self.memory()}", flush=True)

    def memory(self) -> list[int]:
        """Resident megabytes of the box and of its engines."""
        pids = [self._box.process.pid, *(one["pid"] for one in self._box.engines() if one["pid"])]
        return [_resident(pid) for pid in pids]

    def report(self) -> str:
        lines = [f"{what} {status}: {n}" for (what, status), n in sorted(self.answers.items())]
        total = sum(self.answers.values())
        lines.append(f"{total} requests, {len(self.failures)} failures")
        return "\n".join([*lines, *self.failures[:20]])


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) >> 10 for line in status.splitlines() if "VmRSS" in line)


def _name_what_is_there(document: dict[str, Any], home: Path) -> None:
    """Operations of the admin are to find something: keys and accounts of their own, so that they
    never revoke the fuzzer's."""
    keys, accounts = [], []
    for number in range(3):
        accounts.append(name := f"fuzzed-{number}")
        run_command("accounts", "create", name, home=home)
        keys.append(run_command_json("keys", "create", "--account", name, home=home)["id"])
    there = {"key_id": keys, "account": accounts}
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path" and parameter["name"] in there:
                    parameter["schema"] = {"enum": there[parameter["name"]]}


def _with_a_model(document: dict[str, Any]) -> dict[str, Any]:
    """Most requests are to name a model that is there, and to be short."""
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties and {"messages", "prompt", "input"} & set(properties):
            properties["model"] = {"enum": [MODEL]}
    return document
