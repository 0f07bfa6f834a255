"""The pages' Ed25519 and SHA-2 in Chromium; `tests/test_verifier_in_javascript.py` says more."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from pathlib import Path

from tests.browser.conftest import OpenWindow
from tests.support import receipt_vectors
from tests.support.process_box import Box

VECTORS = Path(__file__).parent.parent / "vectors"
BYTES = (
    "const bytes = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (two) => parseInt(two, 16));"
)
SIGNATURES = """async (cases) => {
  const { verify } = await import("/static/ed25519.js");
  %s
  return cases.map(([key, message, signature]) => (
    verify(bytes(signature), bytes(message), bytes(key))
  ));
}"""
DIGESTS = """async (messages) => {
  const { sha256, sha512 } = await import("/static/sha2.js");
  %s
  const hex = (digest) => Array.from(digest, (one) => one.toString(16).padStart(2, "0")).join("");
  return messages.map((message) => [hex(sha256(bytes(message))), hex(sha512(bytes(message)))]);
}"""
RECEIPTS = """async (receipts) => {
  const { verifyReceipt } = await import("/static/verify.js");
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const failed = [];
  for (const receipt of receipts) {
    const checks = await verifyReceipt(bytes(receipt));
    failed.push(checks.filter(({ ok }) => !ok).map(({ id }) => id));
  }
  return failed;
}"""


def test_signatures_digests_and_receipts_are_judged_in_chromium(
    fake_box: Box, open_window: OpenWindow
) -> None:
    page = open_window(fake_box.url).page
    page.goto("/docs")
    rfc = json.loads((VECTORS / "rfc8032_ed25519.json").read_text())["tests"]
    asked = [(case["key"], case["message"], case["signature"], True) for case in rfc]
    groups = json.loads((VECTORS / "wycheproof_ed25519.json").read_text())["testGroups"]
    asked += [
        (group["key"], test["msg"], test["sig"], test["result"] == "valid")
        for group in groups
        for test in group["tests"]
    ]
    found = page.evaluate(SIGNATURES % BYTES, [case[:3] for case in asked])
    assert found == [valid for *_, valid in asked]

    messages = [random.Random(length).randbytes(length) for length in (0, 1, 55, 56, 64, 111, 112)]
    digests = page.evaluate(DIGESTS % BYTES, [message.hex() for message in messages])
    assert digests == [
        [hashlib.sha256(message).hexdigest(), hashlib.sha512(message).hexdigest()]
        for message in messages
    ]

    expected = json.loads(receipt_vectors.EXPECTED.read_text())
    files = [receipt_vectors.FOLDER / f"{name}.json" for name in expected]
    receipts = [base64.b64encode(file.read_bytes()).decode() for file in files]
    assert page.evaluate(RECEIPTS, receipts) == list(expected.values())
