"""Writes frames.json and records.json: what the code of ffd1110 says to peers, and its values."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
from msgspec import msgpack
from nacl.signing import SigningKey

from pinaivu_box.engine.messages import Constraint, Sampling, TokenLogprob, Tools
from pinaivu_box.identity import Identity
from pinaivu_box.peering import (
    advert,
    invite,
    joining,
    membership,
    netting,
    opening,
    roster,
    signed,
    wire,
    work,
)
from pinaivu_box.peering import (
    gossip_wire as g,
)
from pinaivu_box.peering import (
    ledger_wire as w,
)
from pinaivu_box.peering import (
    model_wire as m,
)

HERE = Path(__file__).parent
A, B, C = (Identity(SigningKey(hashlib.sha256(b"before %d" % n).digest())) for n in range(3))
NETWORK = signed.network_of(A.node_id, b"\x01\x02\x03\x04")


def plain(value: Any) -> Any:
    """As JSON; of a struct every field, under the names on the wire."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        values = [plain(getattr(value, name)) for name in value.__struct_fields__]
        if config.array_like:
            return ([config.tag] if config.tag is not None else []) + values
        named = dict(zip(value.__struct_encode_fields__, values, strict=True))
        return {**({config.tag_field: config.tag} if config.tag is not None else {}), **named}
    if isinstance(value, bytes):
        return f"hex:{value.hex()}"
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


HEX, SIG = "ab" * 32, "cd" * 64
SAMPLING = Sampling(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    seed=-(2**63),
    ignore_eos=True,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    logit_bias={"7": -100.0, "42": 1.5},
    typical_p=0.95,
    repeat_penalty=1.1,
    min_tokens=3,
)
MESSAGES = [
    {"role": "system", "content": "Antworte kurz. Grüße! 🦊"},
    {"role": "user", "content": "Say hello."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
TASK = work.Task(
    request_id="req_01m8jw26mke71a7sxaax08p8mq",
    model="smollm2:135m",
    messages=MESSAGES,
    asked=work.Asked(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05),
    seed=2**63 - 1,
    max_tokens=128,
    stop=["zebra", "\n\n"],
    nonce=HEX,
    choice=2,
    prompt_number=1,
    leg=3,
    ignore_eos=True,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    repeat_penalty=1.1,
    typical_p=0.95,
    min_tokens=3,
    logit_bias={"7": -100.0, "42": 1.5},
    priority=-7,
    prompt="Once upon a time",
    tools=Tools('[{"name":"weather"}]', ["weather"], "required", False),
    template={"enable_thinking": False, "depth": 2, "share": 0.5, "style": "brief"},
    constraint=Constraint("json_schema", '{"type":"object"}'),
    logprobs=5,
    prediction="Once upon",
    cache=False,
    suffix="The end.",
    echo=True,
    scored=4,
    unsaid=2,
    inputs=["a cat", [1, 2, 3]],
    dimensions=64,
    read=[0, 1, 2**31 - 1],
    thinking=True,
    settled=SAMPLING,
    tag="ef" * 16,
)
SMALL_TASK = work.Task(
    request_id="req_01m8jw28b5ek98esptc7rygt6e",
    model="m:1",
    messages=[],
    asked=work.Asked(),
    seed=0,
    max_tokens=None,
    stop=[],
    nonce=HEX,
)
LOGPROBS = [
    TokenLogprob(b"Hel", -0.25, [(b"Hel", -0.25), (b"\xff\x00", -1.5)]),
    TokenLogprob(b"lo", 0.0, []),
]
OUT = work.Out("Hello", [1, 2], "stop", 1.5, 7, 9, LOGPROBS, "zebra", [b"\0\0\x80?", b""])

TO_SERVING = [
    work.Ask(TASK, HEX, [5, 6], ("0.5", "0.1", "2"), "credits", False, 2),
    work.Ask(SMALL_TASK, HEX, [], ("0", "0", "0"), "EUR"),
    work.Ask(msgspec.structs.replace(SMALL_TASK, prompt=[1, 2]), HEX, [], ("0", "0", "0"), "EUR"),
    work.Count(TASK, HEX, [1, 2], True),
    work.Count(SMALL_TASK, HEX),
    work.Stop(),
    work.Accepted(SIG),
    work.Disputed("the commitment to the output is another"),
]
TO_COORDINATOR = [
    work.Refused("model_busy", "This box is busy: try again.", "model", 7, True),
    work.Refused("server_error", "Something failed."),
    work.Began(HEX, "b1234", "CPU", SAMPLING, "tags", True, "12" * 32, 2),
    work.Began(HEX, "b1234", "CPU", Sampling(0.0, 1.0, 0, 0.0, 7), "qwen", False, "12" * 32),
    work.Read([1, 2, 3], True, "Once"),
    work.Read([]),
    work.Outputs([OUT, work.Out("", [])], SIG),
    work.Outputs([], SIG),
    work.Alive(),
    work.Proved('{"v":2}', SIG),
    work.Tokens([1, 2], "Once", True, 8192),
    work.Tokens([]),
]
OFFER = advert.Offer("smollm2:135m", bytes(range(32)), 8, 3, 4096, 2, 120, 35, ("0.5", "0.1", "2"))
CERTIFICATE = membership.Certificate(
    signed.network_key(NETWORK),
    signed.key_of(B.node_id),
    signed.key_of(A.node_id),
    "ben",
    1_764_400_000_000,
    3,
    True,
    1,
)
FOUNDER = membership.Certificate(
    signed.network_key(NETWORK),
    signed.key_of(A.node_id),
    signed.key_of(A.node_id),
    "anna",
    1_764_300_000_000,
    1,
    True,
)
GUEST = membership.Certificate(
    signed.network_key(NETWORK),
    signed.key_of(C.node_id),
    signed.key_of(B.node_id),
    "Grüße",
    1_764_400_100_000,
    1,
)
REVOCATION = membership.Revocation(
    signed.network_key(NETWORK),
    signed.key_of(C.node_id),
    signed.key_of(A.node_id),
    1_764_400_200_000,
    "stolen",
    1,
)
ADVERT = advert.Advert(
    signed.network_key(NETWORK),
    signed.key_of(B.node_id),
    17,
    1_764_400_300_000,
    15,
    "1.2.3",
    ("192.0.2.1:4002", "[2001:db8::1]:4002"),
    "credits",
    (OFFER,),
    True,
)
SHORT_ADVERT = advert.Advert(
    signed.network_key(NETWORK),
    signed.key_of(A.node_id),
    1,
    1_764_400_300_000,
    600,
    "",
    (),
    "",
    (),
)
GONE = advert.Gone(
    signed.network_key(NETWORK), signed.key_of(B.node_id), 17, signed.key_of(A.node_id)
)
RECORDS = {
    "member": [(CERTIFICATE, A), (FOUNDER, A), (GUEST, B)],
    "revocation": [(REVOCATION, A)],
    "advert": [(ADVERT, B), (SHORT_ADVERT, A)],
    "gone": [(GONE, A)],
}
SEALED = {
    kind: [signed.seal(by, kind, content) for content, by in contents]
    for kind, contents in RECORDS.items()
}
LOAD = g.Load(3, 4096, 2)
GOSSIP = [
    g.Have(bytes(range(32)), bytes(range(16))),
    g.Have(),
    g.Want(bytes(16), bytes(8)),
    g.Want(),
    g.Give((g.Given(SEALED["member"][0], 1500), g.Given(SEALED["advert"][0]))),
    g.Give(()),
    g.Digest(bytes(range(16)), bytes(range(16))),
    g.Digest(bytes(16)),
    g.Parts(bytes(range(256)) * (8 * g.BUCKETS // 256) + bytes(8 * g.BUCKETS % 256), True),
    g.Parts(bytes(8 * g.BUCKETS)),
    g.Busy((("smollm2:135m", LOAD), ("fake:1", g.Load(0, 0, 2**31)))),
    g.Who("smollm2:135m"),
    g.Told("smollm2:135m", ((signed.key_of(A.node_id), LOAD), (signed.key_of(B.node_id), LOAD))),
]
ITEMS = [
    netting.Item(
        A.node_id, f"req_{n}", n, 0, "credits", 10**9 * n, hashlib.sha256(b"%d" % n).digest()
    )
    for n in range(1, 4)
]
S64, PLACE = bytes(range(64)), ITEMS[0].place
WIRE_ENTRY = w.WireEntry(
    A.node_id, 28_000_000, b'{"v":2}', S64, S64[::-1], "req_1", 0, 1, "credits"
)
LEDGER = [
    w.Begin(7, bytes(range(32))),
    w.Begin(0, b""),
    w.Wait(),
    w.Look(7, "req_9"),
    w.Look(0),
    w.Books(3, b"{}", S64, S64),
    w.Books(0),
    w.Ask([b"", b"\x01\x02"]),
    w.Parts([netting.Part(ITEMS), netting.Part([], bytes(range(256)) * 16)]),
    w.Give([PLACE]),
    w.Entries([WIRE_ENTRY]),
    w.Entries([]),
    w.Take([WIRE_ENTRY]),
    w.Taken({PLACE: "the signature of its proof is not right"}),
    w.Taken({}),
    w.Claims([w.Claim(28_000_000, b'{"v":2}', S64, "req_1", 0, 1, "credits")]),
    w.Unaccepted(),
    w.Judged({PLACE: S64}, {ITEMS[1].place: "there is no receipt of that request here"}),
    w.Propose(b"{}", S64),
    w.Agreed(S64),
    w.Done(),
    w.Sorry("The books differ."),
]
QUESTIONS = [
    m.Find("smollm2:135m", "abcdef01", True),
    m.Find("smollm2:135m", ""),
    m.List(HEX),
    m.Give(HEX, 7),
]
ANSWERS = [
    m.Have("smollm2:135m", HEX, 2**30, (m.File(HEX, 2**29), m.File("12" * 32, 2**29))),
    m.Have("smollm2:135m", HEX, 1),
    m.Hashes(bytes(range(64))),
    m.Part(b"GGUF"),
    m.Working(),
    m.Refused("This box does not share its models."),
]
TICKET = invite.Ticket(
    signed.key_of(A.node_id),
    signed.network_key(NETWORK),
    bytes(range(16)),
    1_764_500_000,
    ("192.0.2.1:4002", "box.example.org:4002"),
)
FRAMES: dict[str, list[msgspec.Struct]] = {
    "hello": [wire.Hello((1, 2), "1.2.3", 1764400000.25)],
    "open": [opening.Open("work", 1)],
    "refusal": [opening.Refusal(426, "this box has no 'x' of version 9: update it")],
    "join": [joining.Join(bytes(range(16)), "ben")],
    "welcome": [joining.Welcome((SEALED["member"][1], SEALED["member"][0]))],
    "leg, to the serving box": TO_SERVING,
    "leg, to the coordinator": TO_COORDINATOR,
    "gossip": GOSSIP,
    "ledger": LEDGER,
    "model, question": QUESTIONS,
    "model, answer": ANSWERS,
}
DECODE = {
    "hello": wire.decode_hello,
    "open": opening.decode_open,
    "refusal": opening._refusal.decode,
    "join": joining._join.decode,
    "welcome": joining._welcome.decode,
    "leg, to the serving box": work.to_serving.decode,
    "leg, to the coordinator": work.to_coordinator.decode,
    "gossip": g.decode,
    "ledger": w.decoder.decode,
    "model, question": m.question,
    "model, answer": m.answer,
}


def others(kind: str, frame: bytes) -> list[bytes]:
    """The frame from an older box, without what may be left out, and from a newer one."""
    raw, made = msgpack.decode(frame), []
    (value,) = [DECODE[kind](frame)]
    config, names = value.__struct_config__, value.__struct_fields__
    required = len(names) - len(value.__struct_defaults__)
    if config.array_like:
        made.append(msgpack.encode([*raw, "what comes later"]))
        if value.__struct_defaults__:
            made.append(msgpack.encode(raw[: required + (config.tag is not None)]))
    else:
        made.append(msgpack.encode({**raw, "later": {"nested": [1]}}))
        if value.__struct_defaults__:
            optional = value.__struct_encode_fields__[required:]
            made.append(msgpack.encode({k: v for k, v in raw.items() if k not in optional}))
    return made


def recorded(kind: str, frames: list[msgspec.Struct]) -> dict[str, Any]:
    encoded = [msgpack.encode(one) for one in frames]
    assert all(DECODE[kind](data) == one for data, one in zip(encoded, frames, strict=True))
    rest = {data for one in encoded for data in others(kind, one)} - set(encoded)
    return {
        "exact": [{"frame": d.hex(), "values": plain(DECODE[kind](d))} for d in encoded],
        "decoded": [{"frame": d.hex(), "values": plain(DECODE[kind](d))} for d in sorted(rest)],
    }


class Recorder:
    def __init__(self) -> None:
        self.frames: list[bytes] = []

    async def send(self, *frames: bytes) -> None:
        self.frames += frames


def split() -> dict[str, Any]:
    """How a long message is split; `frame` is the message without its prompt of so many x."""
    import asyncio

    count = 2_500_000
    message = work.Ask(
        msgspec.structs.replace(SMALL_TASK, prompt="x" * count), HEX, [], ("0", "0", "0"), "EUR"
    )
    stream = Recorder()
    asyncio.run(work.send(stream, message, work.Stop()))  # type: ignore[arg-type]
    return {
        "prompt": count,
        "frames": [[len(f), hashlib.sha256(f).hexdigest()] for f in stream.frames],
    }


def derived() -> dict[str, Any]:
    """What is computed from records and entries, and said of them in frames."""
    members = roster.Roster(NETWORK)
    admitted = members.admit([*SEALED["member"], *SEALED["revocation"]])
    assert not admitted.forged
    books = netting.Books(ITEMS)
    many = netting.Books(
        netting.Item(A.node_id, f"req_{n}", 0, 0, "credits", n, hashlib.sha256(b"%d" % n).digest())
        for n in range(300)
    )
    statement = netting.compose(
        books, (B.node_id, A.node_id), 2, b"before", "req_9", "2026-11-01T00:00:00.000Z"
    )
    from pinaivu_box.receipts.receipt import canonical, mark_text

    text = canonical(statement)
    return {
        "network": NETWORK,
        "members": sorted(members.members()),
        "record ids": {
            kind: [membership.record_id(one).hex() for one in SEALED[kind]]
            for kind in ("member", "revocation")
        },
        "advert ids": [
            advert.record_id(one, advert.read(one)).hex()
            for kind in ("advert", "gone")
            for one in SEALED[kind]
        ],
        "roster digest": members.digest().hex(),
        "roster buckets": b"".join(members.buckets()).hex(),
        "items": [plain(one) for one in ITEMS],
        "places": [one.place.hex() for one in ITEMS],
        "hash of three": books.hash().hex(),
        "part of three": plain(books.part(b"")),
        "part of 300": plain(many.part(b"")),
        "part of 300 below": plain(many.part(bytes([7]))),
        "statement": text.decode(),
        "statement id": netting.statement_id(text),
        "mark": mark_text("req_1", 2, 3, 40, HEX).decode(),
        "secret hash": invite.secret_hash(bytes(range(16))),
    }


def constants() -> dict[str, Any]:
    from pinaivu_box.peering.network import GOSSIP
    from pinaivu_box.receipts import receipt

    return {
        "alpn": wire.NAME,
        "versions": list(wire.VERSIONS),
        "length of 5": wire.LENGTH.pack(5).hex(),
        "end frame": wire.END_FRAME.hex(),
        "beat": wire.BEAT.hex(),
        "max frame bytes": wire.MAX_FRAME_BYTES,
        "max hello bytes": wire.MAX_HELLO_BYTES,
        "max reason bytes": wire.MAX_REASON_BYTES,
        "max streams": wire.MAX_STREAMS,
        "codes": sorted(int(code) for code in wire.Code),
        "purposes": sorted([work.PURPOSE, m.PURPOSE, joining.PURPOSE, GOSSIP, "ledger"]),
        "domains": sorted(
            [
                receipt.PROOF_DOMAIN,
                receipt.ACCEPTANCE_DOMAIN,
                receipt.MARK_DOMAIN,
                receipt.RECEIPT_DOMAIN,
                netting.DOMAIN,
                *map(signed.domain, ("member", "revocation", "advert", "gone")),
            ]
        ),
    }


if __name__ == "__main__":
    frames = {kind: recorded(kind, of) for kind, of in FRAMES.items()}
    result = {"constants": constants(), "split": split(), "derived": derived(), "frames": frames}
    (HERE / "frames.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = invite.encode(TICKET)
    assert invite.decode(text) == TICKET
    records = {
        "keys": [one.node_id for one in (A, B, C)],
        "ticket": {"text": text, "values": plain(TICKET)},
        "records": [
            {
                "kind": one.kind,
                "body": one.body.hex(),
                "signature": one.signature.hex(),
                "values": plain(
                    (membership if kind in ("member", "revocation") else advert).read(one)
                ),
            }
            for kind, sealed in SEALED.items()
            for one in sealed
        ],
    }
    (HERE / "records.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
