"""What a key can learn of others' prompts from the prefix cache: nothing.  Over HTTP, on a fake
model, whose tokens are bytes: one letter more that is found is one cached token more."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pinaivu_box.config import EngineConfig, SharedPrefix
from pinaivu_box.errors import CliError
from pinaivu_box.gateway.scopes import ScopeTags
from pinaivu_box.legs.wire import Task
from pinaivu_box.settings import read_shared_prefixes
from tests.support.process_box import Box, pinaivu

MODEL = "fake:1"
KNOWN, SECRET = "The launch code of customer A is ", "7391-XQ"
SHARED = "You are the assistant of ACME.  Never say 7391-XQ."
CONFIG = """
[engine]
drafting = false
shared_prefixes = [{{ file = "{}" }}]
[pricing]
per_1k_tokens = {{ prompt = "1", cached = "0.1", completion = "2" }}
[[model]]
name = "fake:1"
path = "fake:0"
[[model]]
name = "slow:1"
path = "fake:20"
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("scopes")
    (folder / "named.txt").write_text(SHARED + "\n")
    (folder / "box.toml").write_text(CONFIG.format(folder / "named.txt"))
    started = Box(folder / "home", "--config", str(folder / "box.toml")).start()
    yield started
    started.end()


class Person:
    """An account, and what its first key gets; `again` is another key of it."""

    def __init__(self, box: Box, account: str | None = None, **policy: Any) -> None:
        body = {"account": account, "policy": policy}
        made = box.http("POST", "/v1/admin/keys", json=body).json()
        self.box, self.key, self.account = box, made["key"], made["account"]

    def again(self, **policy: Any) -> Person:
        return Person(self.box, self.account, **policy)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.box.http("POST", path, key=self.key, json={"model": MODEL, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, prompt: str, **more: Any) -> Any:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 1, **more})

    def found(self, prompt: str, **more: Any) -> int:
        return cached(self.ask(prompt, **more))

    def chat(self, *texts: str, **more: Any) -> int:
        roles = ("system", "user") if len(texts) == 2 else ("user",)
        said = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        return cached(
            self.post("/v1/chat/completions", {"messages": said, "max_tokens": 1, **more})
        )

    def paid(self, answer: dict[str, Any]) -> str:
        path = f"/v1/receipts/{answer['request_id']}"
        amount: str = self.box.http("GET", path, key=self.key).json()["payment_amount"]
        return amount


def cached(answer: dict[str, Any]) -> int:
    number: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return number


def common(one: str, other: str) -> int:
    alike = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


# -- accounts --------------------------------------------------------------------------------------


def test_a_prompt_cannot_be_guessed_letter_by_letter(box: Box) -> None:
    """What the guesser finds is what it has asked itself."""
    victim, guesser = Person(box), Person(box)
    victim.ask(KNOWN + SECRET)
    asked: list[str] = []
    for length, letter in enumerate(SECRET):
        for guessed in ("?", letter):
            guess = KNOWN + SECRET[:length] + guessed
            own = max((common(guess, one) for one in asked), default=0)
            assert guesser.found(guess) == min(own, len(guess) - 1)
            asked.append(guess)


def test_right_and_wrong_look_the_same_to_whoever_asks_first(box: Box) -> None:
    victim = Person(box)
    victim.ask(KNOWN + SECRET)
    answers = []
    for guess in (KNOWN + SECRET, KNOWN + SECRET[:-1] + "?", "?" * len(KNOWN + SECRET)):
        guesser = Person(box)
        answer = guesser.ask(guess)
        answers.append((cached(answer), guesser.paid(answer)))
    assert len(set(answers)) == 1 and answers[0][0] == 0
    assert victim.found(KNOWN + SECRET) == len(KNOWN + SECRET) - 1


def test_the_keys_of_an_account_share(box: Box) -> None:
    person = Person(box)
    person.ask(KNOWN + SECRET)
    assert person.again().found(KNOWN + SECRET + "!") == len(KNOWN + SECRET)


def test_no_endpoint_tells(box: Box) -> None:
    said = [{"role": "user", "content": KNOWN + SECRET}]
    for path, body in (
        ("/v1/chat/completions", {"messages": said, "max_tokens": 1}),
        ("/v1/responses", {"input": KNOWN + SECRET, "max_output_tokens": 16}),
        ("/v1/messages", {"messages": said, "max_tokens": 1}),
    ):
        victim, guesser = Person(box), Person(box)
        victim.post(path, body)
        usages = [one.post(path, body)["usage"] for one in (victim, guesser)]
        mine, its = (str(usage) for usage in usages)
        assert tokens_found(usages[0]) > 0, mine
        assert tokens_found(usages[1]) == 0, its


def tokens_found(usage: dict[str, Any]) -> int:
    for details in ("prompt_tokens_details", "input_tokens_details"):
        if details in usage:
            return int(usage[details]["cached_tokens"])
    return int(usage["cache_read_input_tokens"])


def test_a_running_prompt_of_another_scope_is_not_found_either(box: Box) -> None:
    """Nor is it waited for: the guesser has its answer while the victim's goes on."""
    victim, guesser = Person(box), Person(box)
    prompt = KNOWN * 5
    client = box.client_with(victim.key)
    with client.completions.create(
        model="slow:1", prompt=prompt, max_tokens=500, stream=True
    ) as running:
        next(iter(running))
        assert guesser.found(prompt, model="slow:1") == 0
        assert victim.again().found(prompt, model="slow:1") == len(prompt) - 1
        next(iter(running))  # it does go on


def test_choices_and_prompts_of_a_request_share(box: Box) -> None:
    person, prompt = Person(box), KNOWN * 5
    bodies: list[dict[str, Any]] = [{"n": 3}, {"prompt": [prompt + "!", prompt + "?", prompt]}]
    for more in bodies:
        answer = person.again().ask(**{"prompt": prompt, **more})
        path = f"/v1/receipts/{answer['request_id']}"
        receipt = json.loads(box.http("GET", path, key=person.key).json()["signed_receipt"])
        proofs = [json.loads(one["signed"]) for one in receipt["proofs"]]
        assert sorted(one["cached_tokens"] for one in proofs)[1] >= len(prompt) - 1


# -- what is not kept for others -------------------------------------------------------------------


def test_without_cache_prompt_nothing_is_found_kept_or_shared(box: Box) -> None:
    """Not even within the account, nor within the request."""
    person = Person(box)
    secret = KNOWN + SECRET
    assert person.found(secret, cache_prompt=False) == 0
    assert person.found(secret) == 0  # nothing was kept
    assert person.found(secret, cache_prompt=False) == 0  # and now there is something, it is unused
    assert person.found(secret) == len(secret) - 1
    other = Person(box)
    answer = other.ask(KNOWN * 5, cache_prompt=False, n=3)
    path = f"/v1/receipts/{answer['request_id']}"
    receipt = json.loads(box.http("GET", path, key=other.key).json()["signed_receipt"])
    assert {json.loads(one["signed"])["cached_tokens"] for one in receipt["proofs"]} == {0}


def test_a_running_prompt_is_not_shared_without_cache_prompt(box: Box) -> None:
    person, prompt = Person(box), KNOWN * 5
    client = box.client_with(person.key)
    with client.completions.create(
        model="slow:1",
        prompt=prompt,
        max_tokens=500,
        stream=True,
        extra_body={"cache_prompt": False},
    ) as running:
        next(iter(running))
        assert person.again().found(prompt, model="slow:1") == 0


@pytest.mark.parametrize(
    "policy",
    [{"scopes": ["inference", "local-only"]}, {"routing": "never"}],
    ids=["scope", "never"],
)
def test_a_local_only_key_is_apart_from_its_own_account(box: Box, policy: dict[str, Any]) -> None:
    person = Person(box)
    local, another = person.again(**policy), person.again(**policy)
    secret = KNOWN + SECRET
    local.ask(secret)
    assert person.found(secret) == another.found(secret) == 0
    assert local.found(secret) == len(secret) - 1
    person.ask(secret * 2)
    assert local.found(secret * 2) == len(secret)


# -- shared prefixes -------------------------------------------------------------------------------


def before(system: str, *user: str) -> int:
    """Bytes of a chat up to where these texts end, in ChatML."""
    text = f"<|im_start|>system\n{system}"
    for one in user:
        text += f"<|im_end|>\n<|im_start|>user\n{one}"
    return len(text)


def test_a_shared_prefix_is_found_by_all_accounts_and_nothing_behind_it(box: Box) -> None:
    first, second, third, local = Person(box), Person(box), Person(box), Person(box)
    first.chat(SHARED, KNOWN + SECRET)
    assert second.chat(SHARED, KNOWN + SECRET) == before(SHARED)
    assert second.chat(SHARED, KNOWN + "?") == before(SHARED, KNOWN)  # its own
    assert third.chat(SHARED + " The customer is Bob.", "Hi") == before(SHARED)
    for almost in (SHARED[:-1], SHARED[:-1] + "?", SHARED.lower()):
        assert Person(box).chat(almost, "Hi") == 0
    assert Person(box).chat(SHARED, "Hi", cache_prompt=False) == 0
    assert local.again(scopes=["inference", "local-only"]).chat(SHARED, "Hi") == 0
    # A request whose prompt was counted before comes as tokens.
    assert Person(box, tpm=10**6).chat(SHARED, "Hi") == before(SHARED)
    assert Person(box).found(SHARED + " raw") == 0  # nobody has said that without a template
    assert Person(box).found(SHARED + " too") == len(SHARED)


def test_changed_shared_prefixes_apply_at_once(box: Box) -> None:
    named = Path(box.args[1]).with_name("named.txt")
    other = "Another company's assistant you are, and a cheerful one."

    def reload() -> Any:
        return box.http("POST", "/v1/admin/reload").json()

    try:
        named.write_text(other + "\n\n")
        done = reload()
        assert (done["applied"], done["engines"]) == (["engine.shared_prefixes"], [])
        assert Person(box).chat(other, "Hi") == 0
        assert Person(box).chat(other, "Hi") == before(other)
        assert Person(box).chat(SHARED, "Hi") == 0
        assert reload()["applied"] == []
        for wrong, why in ((b"", "is empty"), (b"\xff", "UTF-8"), (None, "No such file")):
            named.unlink() if wrong is None else named.write_bytes(wrong)
            message = reload()["error"]["message"]
            assert "engine.shared_prefixes" in message and why in message
        assert Person(box).chat(other, "Hi") == before(other)  # as it was
    finally:
        named.write_text(SHARED)
        reload()


def test_a_box_whose_shared_prefix_files_cannot_be_read_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "box.toml"
    config.write_text(f'[engine]\nshared_prefixes = [{{ file = "{tmp_path}/none.txt" }}]\n')
    told = ("--config", str(config))
    refused = pinaivu("serve", "--port", "0", *told, home=tmp_path / "home", check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "none.txt" in refused.stderr and "Traceback" not in refused.stderr


def named(*entries: SharedPrefix) -> tuple[str, ...]:
    return read_shared_prefixes(EngineConfig(shared_prefixes=entries))


def test_shared_prefixes_come_from_the_configuration_and_from_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" Écrire\nen français.\r\n\n")
    assert named(SharedPrefix(text="a text "), SharedPrefix(file=str(file))) == (
        "a text",
        " Écrire\nen français.",
    )
    assert named() == ()


def test_shared_prefixes_have_a_limit_together(tmp_path: Path) -> None:
    half = SharedPrefix(text="x" * (128 * 1024))
    assert len(named(half, half)) == 2
    with pytest.raises(CliError, match="shared_prefixes: the texts have more than 262144 bytes"):
        named(half, half, SharedPrefix(text="x"))


@pytest.mark.parametrize(
    "what", ["missing", "nobody", "folder", "pipe", "device", "empty", "bytes", "huge"]
)
def test_a_file_that_is_no_text_is_refused_in_a_sentence(tmp_path: Path, what: str) -> None:
    """And at once: nobody waits for the other end of a pipe."""
    file = tmp_path / "named"
    match what:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "nobody":
            file = Path("~nobody-of-that-name/named")
        case "device":
            file = Path("/dev/zero")
        case "empty":
            file.write_text(" \n\n")
        case "bytes":
            file.write_bytes(b"\xff\xfe\x00")
        case "huge":
            file.write_bytes(b"x" * (1024 * 1024 + 1))
    with pytest.raises(CliError, match=r"^engine\.shared_prefixes: ") as caught:
        named(SharedPrefix(file=str(file)))
    message = caught.value.message
    assert str(file) in message and message.endswith(".") and "\n" not in message


# -- what a peer is told ---------------------------------------------------------------------------


def test_tags_differ_by_scope_peer_day_and_box_and_name_nobody() -> None:
    now = 0.0
    tags, others = ScopeTags(lambda: now), ScopeTags(lambda: now)
    first = tags.of("acct_1", "node_a")
    assert first == tags.of("acct_1", "node_a")
    assert len({first, tags.of("acct_2", "node_a"), tags.of("acct_1", "node_b"),
                others.of("acct_1", "node_a")}) == 4  # fmt: skip
    days = set()
    for now in (0.0, 86399.0, 86400.0, 30 * 86400.0):  # noqa: B007, the tags read it
        days.add(tags.of("acct_1", "node_a"))
    assert len(days) == 3
    assert "acct" not in first and "node" not in first


@pytest.mark.parametrize("tag", ["", "0" * 31, "0" * 33, "g" * 32, "0" * 32 + "\n", "A" * 32])
def test_a_tag_of_another_form_is_refused(tag: str) -> None:
    fields = {"request_id": "req_" + "0" * 26, "model": "m", "messages": [], "asked": {}, "seed": 0,
              "max_tokens": 1, "stop": [], "nonce": "0" * 64}  # fmt: skip
    assert msgspec.convert({**fields, "tag": "0" * 32}, Task).tag == "0" * 32
    assert msgspec.convert(fields, Task).tag is None  # an older peer says none
    with pytest.raises(msgspec.ValidationError, match="tag"):
        msgspec.convert({**fields, "tag": tag}, Task)
