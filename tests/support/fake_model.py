"""What the fake model says, and what it costs."""

from __future__ import annotations

from pinaivu_box.engine.fake_runner import SENTENCE
from tests.support.process_box import Box

FAKE = "fake:1"
CHEAP, DEAR = ("0.001", "0.001", "0.001"), "10"


def fake_text(prompt: int, count: int, after: int = 0) -> str:
    """What the fake model makes of a prompt of so many tokens, from the token `after` on."""
    text = SENTENCE.decode()
    return "".join(text[(prompt - 1 + at) % len(text)] for at in range(after, after + count))


def ask_fake_model(box: Box) -> str:
    """One request to the fake model; its id, once it was acknowledged."""
    answer = box.chat(model=FAKE, max_tokens=3)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])
