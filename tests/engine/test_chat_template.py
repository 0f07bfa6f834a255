"""Messages to prompts: the template of the file, in its sandbox."""

from __future__ import annotations

import pytest
from jinja2.defaults import DEFAULT_NAMESPACE

from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.errors import BadRequest
from tests.support.engine_harness import BUDGET, Engine, Template, TemplatedRunner, add, run

ROLES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def template(source: str) -> Template:
    return Template(source, bos="<s>", eos="</s>")


def test_a_developer_message_is_a_system_message_to_the_template() -> None:
    given_messages = [{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}]
    assert template(ROLES).render(given_messages) == "[system]D[user]U"
    assert given_messages[0]["role"] == "developer"  # the caller's stay as they are


def test_the_template_sees_its_tokens_and_the_generation_prompt() -> None:
    source = "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}{{ eos_token }}"
    assert template(source).render([]) == "<s>go</s>"


def test_chatml() -> None:
    assert template(CHATML).render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.upper() }}",
        "{{ nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_that_objects_is_a_bad_request(source: str) -> None:
    with pytest.raises(BadRequest) as caught:
        template(source).render([{"role": "user", "content": "Hi"}])
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_a_refusing_template_refuses_its_request_and_no_other() -> None:
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    engine = Engine(TemplatedRunner(refusing + ROLES), token_budget=BUDGET)
    heard = run(engine, [add("a", "no"), add("b", "yes")])
    assert heard.refused["a"].code == "invalid_request"
    assert "not that" in heard.refused["a"].message
    assert heard.ends == {"b": "length"}
    assert bytes(heard.prompts["b"]).decode() == "[user]yes"


OWN = (
    "messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "self", "loop",
    "raise_exception", "strftime_now", *DEFAULT_NAMESPACE,
)  # fmt: skip


def test_variables_of_a_peer_do_not_stand_for_the_template_s_own() -> None:
    source = (
        "{{ strftime_now('%Y') | length }}{{ range(2) | list }}{{ dict(a=bos_token ~ eos_token) }}"
        "{{ namespace(a=1).a }}{{ joiner()() }}{{ cycler('a').next() }}{{ lipsum is callable }}"
        "{{ tools is none }}{{ add_generation_prompt }}{{ raise_exception is callable }}"
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    )
    told = [{"role": "user", "content": "U"}]
    prompt = template(source).render(told)
    assert prompt == "4[0, 1]{'a': '<s></s>'}1aTrueTrueTrueTrue1U"
    assert template(source).render(told, None, dict.fromkeys(OWN, "x")) == prompt


def test_a_request_may_set_the_variables_that_transformers_and_llama_cpp_define() -> None:
    source = "{{ documents is none }}{{ date_string | length }}{{ datetime | length }}{{ level }}"
    assert template(source).render([]) == "True1111"
    assert template(source).render([], None, {"date_string": "now", "level": 7}) == "True3117"
