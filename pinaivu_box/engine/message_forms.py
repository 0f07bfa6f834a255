"""The messages of a chat in the forms that chat templates take.

A template is written for the histories that its authors had in mind, and raises on others: another
order of roles, ids of another length, arguments that are no JSON object.  A message stays in its
chat, so every later request would be refused too.  llama.cpp (`common/chat.cpp`) and vLLM
(`_postprocess_messages`) rewrite some of that; here it is what a template needs, and no message is
left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pinaivu_box import chat_format

Message = dict[str, Any]

_ID_CHARACTERS = 9
_WRAPPED = "arguments"  # the only member of an object that stands for a value that is none
_EMPTY_TURN = "..."


class CallArguments(dict[str, Any]):
    """Arguments of a call for templates that look into them; `written` is the JSON text, for
    templates that write them as they are."""

    __slots__ = ("_written",)

    def __init__(self, value: dict[str, Any], written: str) -> None:
        super().__init__(value)
        self._written = written

    def __str__(self) -> str:
        return self._written

    def __add__(self, other: str) -> str:
        return self._written + other

    def __radd__(self, other: str) -> str:
        return other + self._written


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """`messages` as a template should see them, and then in other forms that it may accept, each
    further from what was sent.  No form comes twice."""
    seen: list[list[Message]] = []
    for shape in _shapes(messages):
        if shape not in seen:
            seen.append(shape)
            for form in _argument_forms(shape):
                yield [_with_arguments(message, form) for message in shape]


def in_words(
    messages: list[Message], functions: list[dict[str, Any]] | None = None
) -> list[Message]:
    """Functions, calls and their results as text, for a template that knows none of them."""
    texts: list[Message] = []
    role = ""
    for message in messages:
        text = _in_words(message)
        if role == "tool" and text["role"] == "user":  # one turn, which templates insist on
            text["content"] = f"{texts.pop()['content']}\n{text['content']}"
        texts.append(text)
        role = message["role"]
    if functions:
        system = chat_format.instructions(functions)
        if texts and texts[0]["role"] == "system":
            system = f"{texts.pop(0)['content']}\n\n{system}"
        texts.insert(0, {"role": "system", "content": system})
    return texts


def in_parts(messages: list[Message]) -> list[Message]:
    """With contents as lists of parts, which some templates of models that see insist on."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def shown(text: str, messages: list[Message]) -> bool:
    """Whether a prompt holds the longest of the user's messages, or of all."""
    messages = [each for each in messages if each["role"] == "user"] or messages
    return max((str(each["content"]).strip() for each in messages), key=len, default="") in text


def raw(text: str) -> bool:
    """Whether a prompt holds content parts as they are, unread."""
    return "'type': 'text'" in text or '"type": "text"' in text


def described(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions with all that OpenAI's API lets one leave out."""
    whole = []
    for function in functions:
        parameters = function.get("parameters")
        parameters = parameters if isinstance(parameters, dict) else {}
        parameters = {"type": "object", "properties": {}, **parameters}
        whole.append({"description": "", **function, "parameters": parameters})
    return whole


# -- arguments -------------------------------------------------------------------------------------


def _argument_forms(messages: list[Message]) -> list[Callable[[str], Any]]:
    """What arguments may be given as: what is no object as text or wrapped, and all as text."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    if not calls:
        return [_text]
    if all(_read(call["function"]["arguments"]) is not None for call in calls):
        return [_object, _text]
    return [_object_or_text, _object, _text]


def _with_arguments(message: Message, form: Callable[[str], Any]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": form(function["arguments"])}})
    return {**message, "tool_calls": calls}


def _read(text: str) -> CallArguments | None:
    """None if they are no object.  No arguments at all are an object without members, and one that
    was written as a JSON string is read all the same."""
    text = text.strip()
    if text in ("", "null"):
        text = "{}"
    for _ in range(2):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if isinstance(value, dict):
            return CallArguments(value, text)
        if not isinstance(value, str):
            return None
        text = value
    return None


def _object(text: str) -> CallArguments:
    arguments = _read(text)
    return CallArguments({_WRAPPED: text}, text) if arguments is None else arguments


def _object_or_text(text: str) -> CallArguments | str:
    arguments = _read(text)
    return text if arguments is None else arguments


def _text(text: str) -> str:
    return str(_object_or_text(text))


# -- shapes ----------------------------------------------------------------------------------------


def _shapes(messages: list[Message]) -> Iterator[list[Message]]:
    yield messages
    # One of these is mostly enough; together they take one another's results.
    changes = (_with_short_ids, _answering, _alternating, _one_call_each, _without_system)
    for change in changes:
        yield change(messages)
    shape = messages
    for change in changes:
        shape = change(shape)
        yield shape
    shape = _alternating(in_words(messages))
    yield shape
    yield _without_system(shape)


def _with_short_ids(messages: list[Message]) -> list[Message]:
    """Mistral's templates insist on ids of nine letters and digits."""
    changed = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [{**call, "id": _short(call.get("id"))} for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            message = {**message, "tool_call_id": _short(message.get("tool_call_id"))}
        changed.append(message)
    return changed


def _short(call_id: Any) -> str:
    name = str(call_id or "")
    if re.fullmatch(f"[a-zA-Z0-9]{{{_ID_CHARACTERS}}}", name):
        return name
    return hashlib.sha256(name.encode(errors="replace")).hexdigest()[:_ID_CHARACTERS]


def _one_call_each(messages: list[Message]) -> list[Message]:
    """Calls of one message as messages, each followed by its result (Llama 3's template)."""
    turns: list[list[Message]] = [[]]  # a message and the results after it
    for message in messages:
        if message["role"] != "tool":
            turns.append([])
        turns[-1].append(message)
    return [message for turn in turns for message in _call_by_call(turn)]


def _call_by_call(turn: list[Message]) -> Iterator[Message]:
    calls = turn[0].get("tool_calls") or () if turn else ()
    if len(calls) < 2:
        yield from turn
        return
    message, *results = turn
    for call in calls:
        yield {**message, "tool_calls": [call]}
        message = {"role": "assistant", "content": ""}
        own = [each for each in results if each.get("tool_call_id") == call.get("id")]
        for result in own[:1]:
            results.remove(result)
            yield result
    yield from results


def _answering(messages: list[Message]) -> list[Message]:
    """Results that answer no call before them are a user's words (gpt-oss, Command R)."""
    answering: list[Message] = []
    waiting: list[Any] = []  # ids of calls without a result
    for message in messages:
        if message["role"] != "tool":
            waiting = [call.get("id") for call in message.get("tool_calls") or ()]
        elif not waiting:
            message = _in_words(message)
        else:
            call_id = message.get("tool_call_id")
            call_id = call_id if call_id in waiting else waiting[0]
            waiting.remove(call_id)
            message = {**message, "tool_call_id": call_id}
        answering.append(message)
    return answering


def _alternating(messages: list[Message]) -> list[Message]:
    """One system message, at the beginning; then user and assistant in turns, the user first.

    Neighbours of one role become one message, and later system messages a user's words.  An empty
    answer is none.  A call and its results are no turn, as Mistral's templates count.
    """
    turns: list[Message] = []
    for message in messages:
        if message["role"] == "system" and turns and turns[-1]["role"] != "system":
            message = {**message, "role": "user"}
        role, calls = message["role"], message.get("tool_calls")
        if role == "assistant" and not message["content"] and not calls:
            continue
        last: Message = turns[-1] if turns else {"role": ""}
        if role == last["role"] != "tool" and not (calls and last.get("tool_calls")):
            content = _joined(last["content"], message["content"])
            turns[-1] = {**last, **message, "content": content}
            continue
        if role in ("assistant", "tool") and last["role"] in ("", "system"):
            turns.append({"role": "user", "content": _EMPTY_TURN})
        elif role == "user" and (last["role"] == "tool" or last.get("tool_calls")):
            turns.append({"role": "assistant", "content": _EMPTY_TURN})
        turns.append(message)
    return turns or [{"role": "user", "content": _EMPTY_TURN}]


def _without_system(messages: list[Message]) -> list[Message]:
    """Some templates know no system role (Gemma's): its words go before the user's."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [{**system, "role": "user"}, *rest]
    user, *rest = rest
    return [{**user, "content": _joined(system["content"], user["content"])}, *rest]


def _joined(before: str, after: str) -> str:
    return f"{before}\n\n{after}" if before and after else before or after


def _in_words(message: Message) -> Message:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    texts = [message["content"]] if message["content"] else []
    style = chat_format.TAGS
    for call in calls:
        name = json.dumps(call["name"], ensure_ascii=False)
        written = f'{{"name": {name}, "arguments": {_text(call["arguments"])}}}'
        texts.append(f"{style.before}{written}{style.after}")
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join(texts)}
