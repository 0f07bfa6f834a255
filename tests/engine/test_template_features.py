"""What chat templates of known families of models use: each source has the features of one of
them, and is shorter than the real one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.engine_harness import Template

FUNCTION = {
    "name": "f",
    "description": "It <does> & é.",
    "parameters": {
        "type": "object",
        "properties": {"x": {"type": "string", "description": "An x."}},
        "required": ["x"],
    },
}
ARGUMENTS = '{"x": "é", "n": [1, true]}'
CALL = {"name": "f", "arguments": ARGUMENTS}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. /no_think"},
    {"role": "user", "content": "<Ask> & é"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "call00001", "type": "function", "function": CALL}],
    },
    {"role": "tool", "tool_call_id": "call00001", "content": "Done."},
    {"role": "assistant", "content": "<think>Hm.</think>\n\nSo."},
    {"role": "user", "content": "More"},
]
TOOL = {"type": "function", "function": FUNCTION}


def written(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


FAMILIES: dict[str, tuple[str, str]] = {
    "llama 3": (
        """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- date_string | length }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- endif %}
{{- messages[0]['content'] + ' ' + system }}
{%- for m in messages if 'tool_calls' in m %}
    {%- for name, value in m.tool_calls[0].function.arguments | items %}
        {{- name + '=' }}{{ value | string }}
    {%- endfor %}
{%- endfor %}""",
        f"<s>11{written(TOOL, indent=4)}<Ask> & é Be brief. /no_thinkx=én=[1, True]",
    ),
    "qwen 3": (
        """{% set ns = namespace(last=-1, steps=true) %}
{% for m in messages[::-1] %}
    {% set at = (messages | length - 1) - loop.index0 %}
    {% if ns.steps and m.role == "user" and m.content is string and not
          (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
        {% set ns.steps = false %}
        {% set ns.last = at %}
    {% endif %}
{% endfor %}
{{ ns.last }}
{% for m in messages %}
    {% if m.role == "assistant" %}
        {% if m.reasoning_content is string %}
{{ m.reasoning_content }}
        {% elif '</think>' in m.content %}
{{ m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}
        {% endif %}
        {% for call in m.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {% endfor %}
    {% elif m.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}{{- '<r>' }}{%- endif %}
        {{- m.content }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '</r>' }}{%- endif %}
    {% endif %}
{% endfor %}
{%- if tools %}{% endif %}""",
        f"5\nHm.\n{ARGUMENTS}\n<r>Done.</r>Hm.\n",
    ),
    "qwen 3 coder": (
        """{% macro shown(name, value) %}
{{- '<' ~ name ~ '>' }}
{{- value | tojson | safe if value is mapping or (value is sequence and value is not string)
    else value | string }}
{%- endmacro %}
{%- for tool in tools %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {%- for name, its in tool.parameters.properties | items %}
        {{- shown(name, its.type) }}
        {%- for key in its.keys() | reject("in", ["type"]) %}
            {{- shown(key, its[key]) }}
        {%- endfor %}
    {%- endfor %}
    {{- shown('required', tool.parameters.required) }}
{%- endfor %}
{%- for m in messages if m.tool_calls is defined and m.tool_calls is iterable
                      and m.tool_calls | length > 0 %}
    {%- for name, value in m.tool_calls[0].function.arguments | items %}
        {{- shown(name, value) }}
    {%- endfor %}
{%- endfor %}""",
        '<x>string<description>An x.<required>["x"]<x>é<n>[1, true]',
    ),
    "mistral": (
        """{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- for m in messages | rejectattr("role", "equalto", "system") %}
    {%- if m["role"] == "user" and m == users[-1] %}
        {{- "[" }}
        {%- for tool in tools %}
            {%- set tool = tool.function %}
            {{- '{"type": "function", "function": {' }}
            {%- for key, value in tool.items() if key != "return" %}
                {%- if value is string %}{{- '"' + key + '": "' + value + '"' }}
                {%- else %}{{- '"' + key + '": ' + value | tojson }}{%- endif %}
                {{- ", " if not loop.last }}
            {%- endfor %}
            {{- "}}" }}
        {%- endfor %}
        {{- "]" }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {%- for call in m.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("nine") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}""",
        f'{{"name": "f", "arguments": {ARGUMENTS}, "id": "call00001"}}[{written(TOOL)}]',
    ),
    "ministral": (
        """{%- for m in messages %}
    {%- if m['content'] is not string %}
        {%- for part in m['content'] if part['type'] in ['text'] %}{{- part['text'] }}{%- endfor %}
    {%- elif m['role'] == 'assistant' and m['content'] | length == 0
             and (m['tool_calls'] is not defined or m['tool_calls'] | length == 0) %}
        {{- raise_exception('says nothing') }}
    {%- else %}{{- m['content'] }}{%- endif %}
    {%- for call in m['tool_calls'] | default([], true) %}
        {%- set arguments = call['function']['arguments'] %}
        {%- if arguments is not string %}{%- set arguments = arguments | tojson | safe %}
        {%- elif arguments == '' %}{%- set arguments = '{}' %}{%- endif %}
        {{- '[ARGS]' + arguments }}
    {%- endfor %}
{%- endfor %}
{%- set tools = tools if tools else [] %}{{- tools | length }}{{ eos_token }}""",
        f"Be brief. /no_think<Ask> & é[ARGS]{ARGUMENTS}Done.<think>Hm.</think>\n\nSo.More1</s>",
    ),
    "deepseek": (
        """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{% set ns = namespace(first=false, system='', is_first=true, last_user=false) %}
{%- for m in messages %}{%- if m['role'] == 'system' %}
    {%- if ns.is_first %}{% set ns.system = ns.system + m['content'] %}{% set ns.is_first = false %}
    {%- else %}{% set ns.system = ns.system + '\\n\\n' + m['content'] %}{%- endif %}
{%- endif %}{%- endfor %}
{%- if tools is defined and tools is not none %}
    {% set ns.system = ns.system ~ ' ' ~ tools | length %}
{%- endif %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' and m['tool_calls'] is defined %}
        {%- for tool in m['tool_calls'] %}
            {{- tool['type'] + '|' + tool['function']['name'] + '```json' + '\\n' }}
            {{- tool['function']['arguments'] + '\\n' + '```' }}
        {%- endfor %}
    {%- elif m['role'] == 'assistant' %}
        {%- set content = m['content'] %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>', 1)[1] %}
        {%- endif %}
        {{- content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}
{{- '<think>' if thinking else '</think>' }}""",
        f"<s>Be brief. /no_think 1function|f```json\n{ARGUMENTS}\n```So.</s></think>",
    ),
    "gpt-oss": (
        """{%- macro kind(spec, required, nullable=false) -%}
    {%- if spec.type == "array" -%}
        {{- kind(spec['items'], []) ~ "[]" }}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{" }}
        {%- for name, its in spec.properties.items() -%}
            {{- name ~ ("?" if name not in (spec.required or [])) ~ ": " }}
            {{- kind(its, spec.required or []) ~ (", " if not loop.last) }}
        {%- endfor -%}
        {{- "}" }}
    {%- else -%}
        {{- spec.type ~ (" | null" if nullable) }}
    {%- endif -%}
{%- endmacro -%}
{{- strftime_now("%Y-%m-%d") | length }}
{%- for tool in tools %}
    {%- set tool = tool.function %}
    {{- "// " + tool.description + "\\n" }}{{ kind(tool.parameters, []) }}
{%- endfor %}
{%- set last = namespace(name=none) %}
{%- for m in messages -%}
    {%- if m.role == 'assistant' and "tool_calls" in m %}
        {%- set call = m.tool_calls[0].function %}
        {{- " to=" + "functions." + call.name + " " + call.arguments | tojson }}
        {%- set last.name = call.name %}
    {%- elif m.role == 'tool' -%}
        {%- if last.name is none %}{{- raise_exception("no call before") }}{%- endif %}
        {{- "functions." + last.name + m.content | tojson }}
    {%- endif -%}
{%- endfor -%}""",
        f'10// It <does> & é.\n{{x: string}} to=functions.f {ARGUMENTS}functions.f"Done."',
    ),
    "command r": (
        """{%- set ns = namespace(ids=[], turns=0) %}
{%- for m in messages %}
    {%- for call in m.tool_calls %}
        {%- set ns.ids = ns.ids + [call.id] %}
        {{- call.function.arguments | dictsort | map("first") | join(",") }}
    {%- endfor %}
    {%- if m.role | lower == 'tool' or m.role | upper == 'TOOL_RESULTS' %}
        {{- ns.ids.index(m.tool_call_id) | string + ": " + m.content }}
    {%- endif %}
{%- endfor %}
{{- tools | map(attribute='function.name') | join(', ') }}
{{- 'no documents' if not documents else documents | length }}""",
        "n,x0: Done.fno documents",
    ),
    "granite": (
        """{%- if tools %}{{- tools | tojson(indent=4) | length > 99 }}{%- endif %}
{%- if documents %}{{- raise_exception('documents') }}{%- endif %}
{%- if controls is defined and 'length' in controls %}{{- controls['length'] }}{%- endif %}
{{- strftime_now('%B %d, %Y').split(', ')[-1] | int > 2000 }}
{%- for m in messages | selectattr('role', 'in', ['user', 'system']) %}
    {{- '<|start_of_role|>' + m['role'] | capitalize + '|' + m.content.strip() }}
    {%- if loop.last and add_generation_prompt %}{{- '!' }}{%- endif %}
{%- endfor %}""",
        "TrueTrue<|start_of_role|>System|Be brief. /no_think<|start_of_role|>User|<Ask> & é"
        "<|start_of_role|>User|More!",
    ),
    "smollm 3": (
        """{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content -%}
    {%- if '/no_think' in system -%}{%- set mode = '/no_think' -%}
    {%- elif '/think' in system -%}{%- set mode = '/think' -%}{%- endif -%}
    {%- set system = system.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{{- mode + ' ' + system -}}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if m.role == 'assistant' -%}
        {%- generation -%}
            {%- set content = m.content.split('</think>')[-1].lstrip('\\n') -%}
            {{- content + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- endif -%}
    {%- if loop.index > 4 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{% generation %}{% set system = 'hidden' %}{% endgeneration %}
{{- system if tools else '' -}}""",
        "/no_think Be brief.<|im_end|>So.<|im_end|>Be brief.",
    ),
    "glm 4": (
        """[gMASK]<sop>
{%- if tools -%}
    {%- for tool in tools %}{{ tool.function | tojson(ensure_ascii=False, indent=2) }}{%- endfor %}
{%- endif -%}
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}
            {%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ visible(m.content) }}
        {{- '/nothink' if (enable_thinking is defined and not enable_thinking
            and not visible(m.content).endswith("/nothink")) else '' }}
    {%- elif m.role == 'assistant' and m.tool_calls -%}
        {%- for tc in m.tool_calls %}
            {%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
            {%- set _args = tc.arguments %}
            {%- for k, v in _args.items() %}<k>{{ k }}</k>
                {{- v | tojson(ensure_ascii=False) if v is not string else v }}
            {%- endfor %}
        {%- endfor %}
    {%- endif %}
{%- endfor -%}""",
        f"[gMASK]<sop>{written(FUNCTION, indent=2)}<Ask> & é<k>x</k>é<k>n</k>[1, true]More",
    ),
    "kimi k2": (
        """{%- macro content(m) -%}{{ m.get('content') if m.get('content') is string else '' }}
{%- endmacro -%}
{%- if tools -%}{{ tools | tojson(separators=(',', ':')) }}{%- endif -%}
{{- [{'b': 1, 'a': 'é'}] | tojson(sort_keys=True, ensure_ascii=True) -}}
{{- {'c': nothing} | tojson -}}
{%- for m in messages -%}
    {%- set role = m.get('name') or m['role'] -%}
    {%- if m['role'] == 'tool' -%}
        {%- set id = m.tool_call_id -%}## Return of {{ id }}
{{ content(m) }}
    {%- elif m['role'] == 'assistant' and m.get('tool_calls') -%}
        {%- for call in m['tool_calls'] -%}
            {{ role }} {{ call['id'] }}
            {%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}
            {%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}""",
        written([TOOL], separators=(",", ":"))
        + f'[{{"a": "\\u00e9", "b": 1}}]{{"c": null}}assistant call00001{ARGUMENTS}'
        "## Return of call00001\nDone.",
    ),
    "hermes": (
        """{%- macro python_type(spec) %}
    {%- set names = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
    {%- if names[spec.type] is defined %}{{- names[spec.type] }}
    {%- elif spec.type == "array" %}{{- "list[" + python_type(spec['items']) + "]" }}
    {%- elif spec.type == "object" %}
        {%- if spec.additionalProperties is defined %}
            {{- "dict[str, " + python_type(spec.additionalProperties) + ']' }}
        {%- else %}{{- "dict" }}{%- endif %}
    {%- else %}{{- "Any" }}{%- endif %}
{%- endmacro %}
{%- for tool in tools %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {{- tool.name + "(" }}
    {%- for name, its in tool.parameters.properties | items %}
        {{- name + ": " + python_type(its) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- ")" }}
    {%- if tool.return is defined %}{{- " -> " + python_type(tool.return) }}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<r>' }}{%- endif %}
        {{- m.content }}
        {%- if not loop.last and loop.nextitem.role != "tool" %}{{- '</r>' }}{%- endif %}
    {%- elif m.role == "assistant" and m.tool_calls %}
        {%- for call in m.tool_calls %}{{- call.function.arguments | tojson }}{%- endfor %}
    {%- endif %}
{%- endfor %}""",
        f"f(x: str){ARGUMENTS}<r>Done.</r>",
    ),
}

WITHOUT_TOOLS: dict[str, tuple[str, str]] = {
    "gemma 3": (
        """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '\\n' -%}
    {%- else -%}
        {%- set first = messages[0]['content'][0]['text'] + '\\n' -%}
    {%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("turns") }}
    {%- endif -%}
    {%- set role = "model" if m['role'] == 'assistant' else m['role'] -%}
    {{ role[0] + ':' + (first if loop.first else "") }}
    {%- if m['content'] is string -%}{{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for part in m['content'] -%}{{ part['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '\\n' }}
{%- endfor -%}""",
        "<s>u:Be brief. /no_think\n<Ask> & é\nm:<think>Hm.</think>\n\nSo.\nu:More\n",
    ),
    "phi 4 mini": (
        "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not "
        "none %}{{ m['tools'] }}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        "<|system|>Be brief. /no_think<|end|><|user|><Ask> & é<|end|>"
        "<|assistant|><think>Hm.</think>\n\nSo.<|end|><|user|>More<|end|><|assistant|>",
    ),
}


@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT_TOOLS])
def test_the_features_of_a_family_s_template_are_known(family: str) -> None:
    if family in FAMILIES:
        source, prompt = FAMILIES[family]
        assert Template(source, bos="<s>", eos="</s>").render(MESSAGES, [FUNCTION]) == prompt
        return
    source, prompt = WITHOUT_TOOLS[family]
    said = [*MESSAGES[:2], *MESSAGES[4:]]
    assert Template(source, bos="<s>", eos="</s>").render(said) == prompt


def test_functions_have_what_a_template_takes_for_granted() -> None:
    source = (
        "{% for t in tools %}{% set f = t.function %}{{ f.name + ': ' + f.description }}"
        "{% for name, its in f.parameters.properties.items() %} {{ name }}{% endfor %};{% endfor %}"
    )
    functions = [{"name": "a"}, {"name": "b", "parameters": {"type": "object"}}, FUNCTION]
    assert Template(source).render(MESSAGES, functions) == "a: ;b: ;f: It <does> & é. x;"
    as_sent = "{{ tools | map(attribute='function') | list | tojson }}"
    assert Template(as_sent).render(MESSAGES, functions) == written(functions)


def test_without_functions_there_are_no_tools() -> None:
    for source in (
        "{% if tools is not none %}tools{% endif %}",  # of transformers, where they are None
        "{% for tool in tools %}tool{% endfor %}",  # of llama.cpp, where they are undefined
        "{% if tools %}tools{% endif %}",
    ):
        assert Template(source).render(MESSAGES) == ""


def test_a_template_that_reads_contents_in_parts_gets_parts() -> None:
    """As those of some models that see, which write nothing for a text, or raise."""
    messages = [MESSAGES[1]]
    passing_over = (
        "{% for m in messages %}{% for part in m.content if part.type == 'text' %}"
        "{{ part.text }}{% endfor %}{% endfor %}!"
    )
    raising = "{% for m in messages %}{{ '' + m['content'][0]['text'] }}{% endfor %}!"
    for source in (passing_over, raising):
        assert Template(source).render(messages) == "<Ask> & é!"
    assert Template("{{ messages[0].role }}").render(messages) == "user"
