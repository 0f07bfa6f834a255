"""Hostile templates and grammars end at their limits, and nobody else waits for them.

What must not end by itself here has limits that are out of reach, and ends when the test says so:
nothing depends on time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pinaivu_box.engine import chat_template, grammar, grammar_validation
from pinaivu_box.engine import sandboxes as engine_sandboxes
from pinaivu_box.engine.messages import Cancel, Constraint, Embed, Refused, Tools
from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.runner import Runner
from pinaivu_box.engine.sandboxed_template import SandboxedTemplate
from pinaivu_box.engine.sandboxes import Sandboxes
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import BadRequest
from pinaivu_box.sandbox import SandboxLimit, SandboxLimits, SandboxPool
from tests.support.engine_harness import (
    BUDGET,
    IMAGES,
    EndingRunner,
    Engine,
    Heard,
    TemplatedRunner,
    add,
    here,
    in_this_process,
    load,
    make,
    run,
)
from tests.support.grammars import chain
from tests.support.preparation_driver import PreparationDriver, name_of
from tests.support.process_box import alive, cpu_seconds, wait_until
from tests.support.sandbox_jobs import pids_of

FOR_EVER = SandboxLimits(cpu_seconds=3600, memory_bytes=1 << 30, wall_seconds=3600)
SHORT = SandboxLimits(cpu_seconds=0.3, memory_bytes=512 << 20)
TOO_LONG = "takes more than 0.3 s of CPU time"

ROLES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LETTERS = Constraint("regex", "[ab]{3}")


class SandboxedDriver(PreparationDriver):
    """Prepares requests in sandboxes of its own."""

    def __init__(self, limits: SandboxLimits) -> None:
        self.templates = SandboxPool("pinaivu_box.engine.chat_template:make", limits=limits)
        self.validations: list[SandboxPool] = []
        source = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + ROLES

        def validation(vocabulary: bytes) -> Any:
            pool = SandboxPool(
                "pinaivu_box.engine.grammar_validation:make", vocabulary, limits=limits
            )
            self.validations.append(pool)
            return pool.run

        sandboxes = Sandboxes(self.templates.run, validation, IMAGES)
        super().__init__(RequestPreparer(TemplatedRunner(source), sandboxes, load(drafting=False)))

    def close(self) -> None:
        for pool in [self.templates, *self.validations]:
            pool.close()


@pytest.fixture
def driver() -> Iterator[SandboxedDriver]:
    made = SandboxedDriver(FOR_EVER)
    yield made
    made.close()


def wait_until_computing(pid: int, idle: float) -> None:
    """Until a child that was ready for jobs when its CPU time was `idle` is within one: a job that
    is cancelled before it has begun leaves its child to the next one."""
    wait_until(lambda: cpu_seconds(pid) > idle + 0.2, "the job to compute")


def test_others_pass_a_grammar_that_compiles_for_ever_and_its_cancellation_ends_it(
    driver: SandboxedDriver,
) -> None:
    driver.take(add("before", constraint=Constraint("regex", "[cd]{3}"), tenant="b"))
    assert name_of(driver.next_reported()) == driver.next_scheduled().id == "before"
    (pid,) = pids_of(driver.validations[0])
    idle = cpu_seconds(pid)
    driver.take(add("hostile", constraint=Constraint("gbnf", chain(20_000)), tenant="a"))
    assert name_of(driver.next_reported()) == "hostile"
    wait_until_computing(pid, idle)
    driver.take(add("second", constraint=LETTERS, tenant="a"))
    driver.take(add("structured", constraint=LETTERS, tenant="b"))
    assert driver.next_scheduled().id == "structured"
    driver.take(add("stream", tenant="b"))
    assert driver.next_scheduled().id == "stream"
    assert alive(pid) and driver.scheduled.empty()  # of one tenant one compiles at a time
    driver.take(Cancel("hostile"))
    assert isinstance(driver.next_scheduled(), Cancel)
    wait_until(lambda: not alive(pid), "the end of its validation")
    assert driver.next_scheduled().id == "second"
    while not driver.reported.empty():
        assert not isinstance(driver.reported.get(), Refused)


def test_others_pass_a_template_that_runs_for_ever_and_its_cancellation_ends_it(
    driver: SandboxedDriver,
) -> None:
    (pid,) = pids_of(driver.templates)  # it has been asked whether it knows tools
    idle = cpu_seconds(pid)
    driver.take(add("hostile", "loop", tenant="a"))
    wait_until_computing(pid, idle)
    driver.take(add("second", "hi", tenant="a"))
    for number in range(2):
        driver.take(add(f"chat{number}", "hi", tenant="b"))
        assert name_of(driver.next_reported()) == driver.next_scheduled().id == f"chat{number}"
    driver.take(Embed("vectors", ["text"], tenant="b"))
    assert name_of(driver.next_reported()) == driver.next_scheduled().id == "vectors"
    assert alive(pid)
    driver.take(Cancel("hostile"))
    assert isinstance(refused := driver.next_reported(), Refused) and refused.id == "hostile"
    assert name_of(driver.next_reported()) == driver.next_scheduled().id == "second"
    wait_until(lambda: not alive(pid), "the end of its child")


# -- limits of grammars ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited() -> Iterator[Sandboxes]:
    """As an engine has them, but for the CPU time."""
    pools: list[SandboxPool] = []

    def pool(*setup: bytes) -> SandboxPool:
        entry = "grammar_validation" if setup else "chat_template"
        pools.append(SandboxPool(f"pinaivu_box.engine.{entry}:make", *setup, limits=SHORT))
        return pools[-1]

    made: list[Any] = []

    def trials(vocabulary: bytes) -> Any:  # all engines here have the same
        if not made:
            made.append(pool(vocabulary).run)
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_sandboxes, "LIMITS", SHORT)
        yield Sandboxes(pool().run, trials, IMAGES)
    for one in pools:
        one.close()


def schema(value: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def nested(levels: int) -> Constraint:
    return Constraint(
        "json_schema", '{"type":"array","items":' * levels + '{"type":"integer"}' + "}" * levels
    )


def doubling(levels: int) -> dict[str, Any]:
    """Small, and 2 to the power of that large if its references were written out."""
    defs: dict[str, Any] = {
        f"d{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}
        for n in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{levels}": {"type": "integer"}}}


EMAIL = {"type": "string", "pattern": "[a-z]{1,50}@[a-z]{1,200}"}
REFUSED = {
    "chain": (Constraint("gbnf", chain(2400)), f"{TOO_LONG} to compile"),
    "nested repetition": (Constraint("regex", "(a{1000}){1000}"), "cannot be followed"),
    "behind a prefix": (Constraint("regex", "x(a{1000}){1000}"), "cannot be followed"),
    "large enum": (schema({"enum": [f"value {n}" for n in range(30_000)]}), "cannot be followed"),
    "patterns": (
        schema({"type": "object", "properties": {f"p{n}": EMAIL for n in range(500)}}),
        "cannot be followed",
    ),
    "nested schema": (nested(50_000), "nested too deeply"),
    "nested GBNF": (
        Constraint("gbnf", "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000),
        "nested too deeply",
    ),
    "nested Lark": (Constraint("lark", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000), ""),
    "nested regex": (Constraint("regex", "(" * 30_000 + "a" + ")" * 30_000), "cannot be followed"),
    "long literal": (
        Constraint("lark", 'start: "' + "abcdefghij" * 6000 + '"'),
        "cannot be followed",
    ),
    "alternatives": (
        schema({"type": "object", "properties": {f"p{n}": {} for n in range(3000)}}),
        "cannot be followed",
    ),
}
FOLLOWED = {
    "intersections": Constraint(
        "lark", "start: A\nA: " + " & ".join(f"/.*{c}.*/" for c in "abcdefghijklmn")
    ),
    "many items": schema({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}),
    "long text": schema({"type": "string", "minLength": 10**6}),
    "recursion": schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}
    ),
    "doubling": schema(doubling(40)),
    "repeated rules": Constraint("lark", 'start: a{1000}\na: b{1000}\nb: "x" | "y"'),
    "any of any of": schema(
        {"anyOf": [{"anyOf": [{"const": f"{a}{b}"} for a in range(20)]} for b in range(20)]}
    ),
}


def served(sandboxes: Sandboxes, **asked: Any) -> Heard:
    """One that asks so, of an engine that serves another one as well."""
    runner = EndingRunner(load(context=600, kv_tokens=6000))
    engine = Engine(runner, token_budget=BUDGET, sandboxes=sandboxes)
    heard = run(engine, [add("r", max_tokens=8, **asked), add("other", max_tokens=20)])
    assert heard.ends["other"] in ("length", "stop")
    return heard


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_beyond_its_limits_is_refused_and_said_why(limited: Sandboxes, name: str) -> None:
    constraint, words = REFUSED[name]
    refused = served(limited, constraint=constraint).refused["r"]
    assert refused.code == "invalid_body"
    assert words in refused.message or TOO_LONG in refused.message  # on a slow machine
    assert refused.param in ("grammar", "response_format") and len(refused.message) < 2000


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_grammar_that_only_looks_large_is_followed(name: str) -> None:
    heard = served(in_this_process(), constraint=FOLLOWED[name])
    assert heard.ends["r"] in ("length", "stop")


@pytest.mark.parametrize(
    "functions",
    [
        json.dumps([{"name": "f", "parameters": json.loads(REFUSED["patterns"][0].text)}]),
        '[{"name":"f","parameters":' + nested(2000).text + "}]",
        json.dumps([{"name": f"f{n}"} for n in range(30_000)]),
        '[{"parameters": 7}]',
        "7",
        "no JSON",
    ],
    ids=["patterns", "nested", "many", "nameless", "number", "text"],
)
def test_tools_beyond_their_limits_are_refused(limited: Sandboxes, functions: str) -> None:
    """Also what only a peer can send."""
    tools = Tools(functions, ["f", *(f"f{n}" for n in range(30_000))], "required")
    refused = served(limited, tools=tools, prompt="x").refused["r"]
    assert refused.code == "invalid_body" and refused.param == "tools"


def test_grammars_and_refusals_are_cached_for_their_tenant_alone() -> None:
    tried: list[bytes] = []
    shared = in_this_process()

    def trials(vocabulary: bytes) -> Any:
        job = grammar_validation.validator(vocabulary)

        def counted(payload: bytes, _: Any) -> bytes:
            tried.append(payload)
            return job(payload)

        return counted

    runner = EndingRunner(load(context=600, kv_tokens=6000))
    engine = Engine(
        runner, token_budget=BUDGET, sandboxes=Sandboxes(shared.templates, trials, IMAGES)
    )
    wrong = Constraint("regex", "(?=a)b")
    adds = [
        add(f"{tenant}{n}", constraint=one, tenant=tenant)
        for n, one in enumerate([LETTERS, wrong, LETTERS, wrong])
        for tenant in "ab"
    ]
    heard = run(engine, adds)
    assert len(tried) == 4
    assert set(heard.refused) == {"a1", "b1", "a3", "b3"}
    assert heard.refused["a1"].message == heard.refused["a3"].message
    assert all(len(heard.text[name]) == 3 for name in ("a0", "a2", "b0", "b2"))
    for n in range(40):  # not for ever
        run(engine, [add(f"c{n}", constraint=Constraint("regex", f"{n}"), tenant="c")])
    run(engine, [add("d", constraint=LETTERS, tenant="c")])
    run(engine, [add("e", constraint=Constraint("regex", "0"), tenant="c")])
    assert len(tried) == 4 + 40 + 2
    run(engine, [add("f", constraint=LETTERS, tenant="a")])  # others' are not pushed out
    assert len(tried) == 4 + 40 + 2


# -- in the steps ----------------------------------------------------------------------------------

AMBIGUOUS = Constraint("lark", "start: " + "s " * 20 + "\ns: /[a-z]/ | s s | ")


def test_a_grammar_that_grows_too_complex_ends_its_own_request() -> None:
    heard = run(
        make(context=600, kv_tokens=6000)[0],
        [add("r", max_tokens=500, constraint=AMBIGUOUS), add("other", max_tokens=400)],
    )
    assert heard.refused["r"].code == "invalid_request"
    assert "too complex" in heard.refused["r"].message
    assert heard.ends["other"] in ("length", "stop")


def test_a_tenant_whose_grammars_take_too_long_in_the_steps_loses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them; other tenants keep theirs."""
    allows = grammar.Grammar.allows

    def slowly(its: Any, token: int) -> bool:
        if its._budget is slow:
            slow.spend(0.05)
        return allows(its, token)

    slow = grammar.CpuBudget()
    monkeypatch.setattr(grammar.Grammar, "allows", slowly)
    monkeypatch.setattr(
        grammar.GrammarCompiler,
        "_budget",
        lambda its, tenant: slow if tenant == "slow" else grammar.CpuBudget(),
    )
    letters = Constraint("regex", "[ab]{30}")
    adds = [
        add(f"{tenant}{n}", max_tokens=50, constraint=letters, tenant=tenant)
        for n in range(2)
        for tenant in ("slow", "other")
    ]
    heard = run(make(EndingRunner, context=600, kv_tokens=6000)[0], adds)
    assert set(heard.refused) == {"slow0", "slow1"}
    assert set(heard.ends) == {"other0", "other1"}


# -- limits of templates ---------------------------------------------------------------------------

TOO_MUCH = {
    "loops": (LOOP, TOO_LONG),
    "repetition": ("{{ 'a' * 3000000000 }}", "memory"),
    "a list": ("{% set x = (range(99999) | list) * 99999 %}", "memory"),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "",
    ),
    "format": ("{{ '%3000000000d' % 1 }}", ""),
    "format method": ("{{ '{:>3000000000}'.format('a') }}", ""),
    "join": ("{{ (['a' * 99999] * 99999) | join }}", ""),
    "power": ("{{ 10 ** (10 ** 10) }}", "CPU time"),
    "macro": ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "output": ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "characters"),
    "clock": ("{{ strftime_now('%c' * 3000000) }}", ""),
    "reason": ("{{ raise_exception('a' * 99999) }}", "fails on every chat"),
}


def rendered(limited: Sandboxes, source: str | None, messages: Any, context: int = 1000) -> str:
    facts = replace(TemplatedRunner(source).facts, context=context)
    made = SandboxedTemplate(limited.templates, facts, load())
    return "".join(made.parts(messages, None, {}))


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_beyond_its_limits_refuses_this_chat(limited: Sandboxes, name: str) -> None:
    source, words = TOO_MUCH[name]
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(BadRequest) as caught:
        rendered(limited, source, messages)
    assert caught.value.param in ("messages", None) and words in caught.value.message
    assert len(caught.value.message) < 1000
    assert rendered(limited, ROLES, messages) == "[user]Hi"  # and no other


def test_a_long_prompt_is_rendered_whole() -> None:
    """Thirty thousand tokens in three thousand turns, within an engine's limits."""
    pool = SandboxPool("pinaivu_box.engine.chat_template:make", limits=engine_sandboxes.LIMITS)
    messages = [{"role": "user", "content": "words, " * 7}] * 3000
    try:
        text = rendered(
            Sandboxes(pool.run, lambda _: pool.run, IMAGES), CHATML, messages, context=32_768
        )
    finally:
        pool.close()
    assert text.count("words, ") == 7 * 3000


UNUSABLE = {
    "syntax": "{% if %}",
    "unknown tag": "{% frobnicate %}",
    "nested": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "long": "x" * 300_000,
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_template_that_cannot_be_used_refuses_chats_alone(limited: Sandboxes, name: str) -> None:
    runner: Runner = TemplatedRunner(UNUSABLE[name])
    preparer = RequestPreparer(runner, limited, load(drafting=False))
    refused = preparer.prepare(add("r"))
    assert isinstance(refused, Refused) and refused.code == "invalid_request"
    assert "chat template of the model's file" in refused.message and len(refused.message) < 1000
    arrival = preparer.prepare(add("r", prompt="text"))
    assert isinstance(arrival, PreparedRequest) and isinstance(arrival.sequence, Sequence)


def test_a_template_that_always_reaches_its_limits_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, runs = [1000.0], []
    monkeypatch.setattr("pinaivu_box.engine.sandboxed_template.time.monotonic", lambda: now[0])
    job = here(chat_template.make(b""))

    def limit(payload: bytes, cancellation: Any) -> bytes:
        if b"loop" in payload:
            runs.append(payload)
            raise SandboxLimit("time", engine_sandboxes.LIMITS)
        return job(payload, cancellation)

    made = SandboxedTemplate(limit, TemplatedRunner(ROLES).facts, load())

    def chat(text: str) -> str:
        with pytest.raises(BadRequest) as caught:
            made.parts([{"role": "user", "content": text}], None, {})
        return caught.value.message

    for _ in range(9):  # whoever sends that much may be at fault himself
        assert "CPU time" in chat("loop" * 50_000)
    made.parts([{"role": "user", "content": "hi"}], None, {})
    runs.clear()
    for _ in range(3):
        assert "CPU time" in chat("loop")
    for wait in (30, 60, 120):
        assert f"next {wait} s" in chat("loop")
        now[0] += wait + 1
        runs.clear()
        assert "CPU time" in chat("loop")
        assert len(runs) == 1
    now[0] += 10_000
    made.parts([{"role": "user", "content": "hi"}], None, {})
    assert "CPU time" in chat("loop") and "CPU time" in chat("loop")
