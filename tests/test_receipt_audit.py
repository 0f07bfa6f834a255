"""`pinaivu receipts audit`: a real box answers, and its answers are computed again by the command;
what a box with the same key could say instead is found."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rfc8785

from pinaivu_box.home import identity_of
from pinaivu_box.identity import Identity
from pinaivu_box.receipts import commitment
from pinaivu_box.receipts.receipt import PROOF_DOMAIN, RECEIPT_DOMAIN
from tests.support.in_process_command import run_command
from tests.support.process_box import MODEL, Box, StartBox
from tests.support.streamed_chat import StreamedChat

Json = dict[str, Any]
VARIANT = "haswell"
pytestmark = pytest.mark.skipif(
    " avx2 " not in Path("/proc/cpuinfo").read_text(), reason="a processor without AVX2"
)
CONFIG = f"""
[receipts]
transcripts = "plain"
[engine]
cpu_variant = "{VARIANT}"
context = 1024
max_sequences = 4
threads = 1
"""
STORY = "Write a short story about a fox and a hen."


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    return module_box(config=CONFIG)


def audited(box: Box, *args: str) -> tuple[int, Json]:
    done = run_command("receipts", "audit", *args, "--json", home=box.home, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def asked(box: Box, path: str = "/v1/chat/completions", **more: Any) -> Json:
    body: Json = {"model": MODEL, "max_tokens": 24, "seed": 5, **more}
    if "prompt" not in body:
        body.setdefault("messages", [{"role": "user", "content": STORY}])
    answer = box.http("POST", path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


ANIMAL = {"type": "object", "properties": {"animal": {"enum": ["fox", "hen"]}},
          "required": ["animal"], "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": ANIMAL}}
REQUESTS: dict[str, Json] = {
    "choices, a penalty and a bias": {
        "n": 2, "frequency_penalty": 0.8, "logit_bias": {"28": 3}, "temperature": 1.1
    },
    "a stop string": {"stop": ["."], "max_tokens": 60},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "animal", "schema": ANIMAL}}},
    "a call": {"tools": [TOOL], "tool_choice": "required"},
    "prompts": {"path": "/v1/completions", "prompt": ["One two", "Three four"], "echo": True,
                "logprobs": 2, "min_tokens": 9},
}  # fmt: skip


@pytest.mark.parametrize("body", REQUESTS.values(), ids=[*REQUESTS])
def test_an_honest_answer_agrees_to_the_bit(box: Box, body: Json) -> None:
    request_id = asked(box, **body)["request_id"]
    status, report = audited(box, request_id)
    assert (status, report["verdict"]) == (0, "agrees")
    assert report["engine"]["exactness"].startswith(f"bitwise:{VARIANT} ")
    for leg in report["legs"]:
        assert leg["mode"] == "bitwise" and leg["numbers"] is True
        assert leg["compared"] == leg["agreeing"] == leg["tokens"] > 0


def test_an_answer_that_two_engines_made(box: Box) -> None:
    """The first was killed, and nobody can promise its numbers; the second's are the same bits."""
    stream = StreamedChat(box, MODEL, 120, temperature=0.9, seed=3)
    stream.wait_for_text(5)
    (engine,) = box.http("GET", "/v1/engines").json()["data"]
    os.kill(engine["pid"], signal.SIGKILL)
    stream.join()
    assert stream.error is None
    status, report = audited(box, stream.request_id)
    assert (status, report["verdict"]) == (0, "agrees")
    first, second = report["legs"]
    assert (first["leg"], first["mode"], second["leg"], second["mode"]) == (
        *(0, "statistical"), *(1, "bitwise"),
    )  # fmt: skip
    assert first["agreeing"] == first["tokens"] > 0 and second["numbers"] is True
    assert first["tokens"] + second["tokens"] == 120


# -- a box that says something else ----------------------------------------------------------------


class Said:
    """A receipt and its transcript, which are changed and signed again with the box's key."""

    def __init__(self, box: Box, request_id: str) -> None:
        self.identity: Identity = identity_of(box.home)
        self.view: Json = box.http("GET", f"/v1/receipts/{request_id}").json()
        self.kept: Json = box.http("GET", f"/v1/receipts/{request_id}/transcript").json()
        self.receipt: Json = json.loads(self.view["signed_receipt"])
        self.proof: Json = json.loads(self.receipt["proofs"][0]["signed"])
        self.opening: Json = self.view["opening"]

    @property
    def leg(self) -> Json:
        return dict(self.kept["transcript"])["legs"][0]  # type: ignore[no-any-return]

    @property
    def prompt(self) -> Json:
        return dict(self.kept["transcript"])["prompts"][0]  # type: ignore[no-any-return]

    def commit(self) -> None:
        """To what prompt and leg have become."""
        tokens = commitment.tokens_sha256(self.leg["tokens"])
        for opening in (self.opening["output"], self.opening["legs"][0]):
            opening["tokens_sha256"] = tokens
        self.opening["prompt"]["tokens_sha256"] = commitment.tokens_sha256(self.prompt["tokens"])

        def committed(opening: Json, text: str) -> str:
            return commitment.recompute(text, msgspec.convert(opening, commitment.Opening))

        prompt = committed(self.opening["prompt"], self.prompt["asked"])
        self.proof["prompt_commitment"] = self.receipt["prompt_commitment"] = prompt
        text = self.leg["text"]
        self.proof["output_commitment"] = committed(self.opening["legs"][0], text)
        self.receipt["output_commitment"] = committed(self.opening["output"], text)

    def write(self, folder: Path) -> list[str]:
        """Files for the command."""
        proof = rfc8785.dumps(self.proof)
        signature = self.identity.sign(PROOF_DOMAIN, proof).hex()
        self.receipt["proofs"] = [{"signed": proof.decode(), "signature": signature}]
        signed = rfc8785.dumps(self.receipt)
        self.view["signed_receipt"] = signed.decode()
        self.view["coordinator_signature"] = self.identity.sign(RECEIPT_DOMAIN, signed).hex()
        self.view.pop("inclusion", None)  # the log has another one
        receipt, transcript = folder / "receipt.json", folder / "transcript.json"
        receipt.write_text(json.dumps(self.view))
        transcript.write_text(json.dumps(self.kept))
        return [str(receipt), "--transcript", str(transcript)]


@pytest.fixture(scope="module")
def honest(box: Box) -> str:
    return str(asked(box, max_tokens=20, temperature=0.7)["request_id"])


def other_token(said: Said) -> None:
    said.leg["tokens"][7] = 28 if said.leg["tokens"][7] != 28 else 30


def cut_prompt(said: Said) -> None:
    """It left out the prompt's beginning, and commits to all of it: seen from the other side."""
    said.prompt["tokens"].insert(1, 28)


def longer_prompt(said: Said) -> None:
    """More than what a template may write otherwise."""
    said.prompt["tokens"][1:1] = [28] * 20


CHEATS: dict[str, tuple[Callable[[Said], None], str, int | None]] = {
    "other numbers": (
        lambda said: said.proof.update(logits_sha256="ab" * 32), "the numbers do not", None
    ),
    "another token": (other_token, "token 8 of the answer", 7),
    "another seed": (lambda said: said.proof["sampling"].update(seed="6"), "seed 6", -1),
    "another temperature": (
        lambda said: said.proof["sampling"].update(temperature=1.6), "another token was drawn", -1
    ),
    "a cut prompt": (cut_prompt, "", None),
    "a longer prompt": (longer_prompt, "", None),
    "a bias that was not asked for": (
        lambda said: said.proof["sampling"].update(logit_bias={"28": 9.0}), "another token", -1
    ),
    "another end": (lambda said: said.proof.update(finish_reason="stop"), "'stop'", None),
    "another text": (lambda said: said.leg.update(text="Something else."), "its tokens", None),
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=[*CHEATS])
def test_a_cheat_is_found(
    box: Box, honest: str, tmp_path: Path, cheat: tuple[Callable[[Said], None], str, int | None]
) -> None:
    change, told, at = cheat
    said = Said(box, honest)
    change(said)
    if said.leg["text"] == "Something else.":
        for opening in (said.opening["output"], said.opening["legs"][0]):
            opening["text_sha256"] = sha256(b"Something else.").hexdigest()
    said.commit()
    said.proof["prompt_tokens"] = len(said.prompt["tokens"])
    said.receipt["usage"]["prompt_tokens"] = said.proof["prompt_tokens"]
    if said.proof["finish_reason"] == "stop":
        said.receipt["finish_reason"] = "stop"
    status, report = audited(box, *said.write(tmp_path))
    (leg,) = report["legs"]
    assert (status, report["verdict"], leg["mode"]) == (1, "differs", "bitwise")
    assert report["other_prompts"] == ([0] if change is longer_prompt else [])
    assert told in leg["meaning"]
    if at is not None:
        first = leg["first"]
        assert first["drawn"] != first["recorded"] and (at < 0 or first["index"] == at)
        assert first["position"] == said.proof["prompt_tokens"] + first["index"]


def test_the_first_difference_is_told_in_a_sentence(box: Box, honest: str, tmp_path: Path) -> None:
    said = Said(box, honest)
    other_token(said)
    said.commit()
    done = run_command("receipts", "audit", *said.write(tmp_path), home=box.home, check=False)
    told = said.proof["prompt_tokens"] + 7
    recorded = said.leg["tokens"][7]
    assert done.returncode == 1 and f"{said.proof['request_id']}: differs." in done.stdout
    assert f"at position {told} (token 8 of the answer, seed 5) token {recorded} (logit " in (
        done.stdout
    )


def test_what_was_not_changed_agrees_from_files_too(box: Box, honest: str, tmp_path: Path) -> None:
    said = Said(box, honest)
    said.commit()
    done = run_command("receipts", "audit", *said.write(tmp_path), home=box.home)
    assert "agrees" in done.stdout and "to the bit" in done.stdout


KEPT: dict[str, Json] = {
    "choices": {"n": 2, "temperature": 0.3, "system": "Be brief."},
    "a stop string": {"stop": ["."], "max_tokens": 60},
    "prompts": {"path": "/v1/completions", "prompt": ["One two", "Three four"], "n": 2,
                "echo": True},
}  # fmt: skip


@pytest.mark.parametrize("body", KEPT.values(), ids=[*KEPT])
def test_a_client_brings_what_it_has_kept(box: Box, tmp_path: Path, body: Json) -> None:
    """Its request and its answer, whose tokens are found again."""
    body = dict(body)
    system = {"role": "system", "content": body.pop("system", "Tell tales.")}
    if "prompt" not in body:
        body["messages"] = [system, {"role": "user", "content": STORY}]
    answer = asked(box, **body)
    path = body.pop("path", "")
    assert path in ("", "/v1/completions")
    request, said, receipt = (tmp_path / name for name in ("request", "answer", "receipt"))
    request.write_text(json.dumps({"model": MODEL, **body}))
    said.write_text(json.dumps(answer))
    receipt.write_bytes(box.http("GET", f"/v1/receipts/{answer['request_id']}").content)
    files = ["--request", str(request), "--answer", str(said)]
    status, report = audited(box, str(receipt), *files)
    assert (status, report["verdict"]) == (0, "agrees"), report
    assert len(report["legs"]) == len(answer["choices"])
    other = "Three four else" if path else "Else"
    answer["choices"][-1].update(text=other, message={"role": "assistant", "content": other})
    said.write_text(json.dumps(answer))
    status, report = audited(box, str(receipt), *files)
    assert (status, report["legs"][-1]["verdict"]) == (1, "not auditable")


def test_a_transcript_of_something_else_is_not_compared(
    box: Box, honest: str, tmp_path: Path
) -> None:
    said = Said(box, honest)
    said.leg["tokens"][3] += 1
    status, report = audited(box, *said.write(tmp_path))
    assert (status, report["verdict"]) == (1, "not auditable")
    assert "does not belong to it" in report["legs"][0]["meaning"]


def test_without_the_file_nothing_is_said(box: Box, honest: str, tmp_path: Path) -> None:
    said = Said(box, honest)
    said.proof["model_digest"] = said.receipt["model_digest"] = "cd" * 32
    status, report = audited(box, *said.write(tmp_path))
    assert (status, report["verdict"]) == (1, "not auditable")
    assert f"no model with the digest {'cd' * 32}" in report["legs"][0]["meaning"]


def test_a_node_that_promises_nothing_is_tested(box: Box, honest: str, tmp_path: Path) -> None:
    """And agrees as well, since it was the same."""
    said = Said(box, honest)
    said.proof["exactness"] = "statistical"
    status, report = audited(box, *said.write(tmp_path))
    (leg,) = report["legs"]
    assert (status, leg["verdict"], leg["mode"]) == (0, "agrees", "statistical")
    assert leg["p_value"] == 1 and leg["false_alarm_rate"] == 0.001
    said.proof["sampling"]["seed"] = "6"
    status, report = audited(box, *said.write(tmp_path))
    (leg,) = report["legs"]
    assert (status, leg["verdict"], leg["mode"]) == (1, "differs", "statistical")
    assert leg["p_value"] < 0.001 and leg["margins"]


def test_mistakes_are_told_in_a_sentence(box: Box, honest: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    for args in (["req_0"], [str(broken)], [honest, "--transcript", str(broken)]):
        done = run_command("receipts", "audit", *args, home=box.home, check=False)
        assert done.returncode == 1 and done.stderr.startswith("pinaivu: "), done.stderr
        assert "Traceback" not in done.stderr
    done = run_command("receipts", "audit", honest, "--node-key", "x", home=box.home, check=False)
    assert done.returncode == 2
