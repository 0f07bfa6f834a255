"""The output of a response, item by item, with the events of its stream in OpenAI's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pinaivu_box.openai.reader import Arguments, ParsedCall, Piece, Reasoning, Text
from pinaivu_box.openai.tools import ClientTool

Event = dict[str, Any]
# The field that grows of a call, by the type of its item.
_ARGUMENTS = {"function_call": "arguments", "custom_tool_call": "input"}
_NO_LOGPROBS: dict[str, Any] = {"logprobs": []}


class ResponseItems:
    """`items` is the output so far; adding to it returns the events of the stream.

    `suffix` makes the ids of the items unique to their response.  `tools` are the
    client's tools by the names that the model calls.
    """

    def __init__(self, suffix: str, tools: Mapping[str, ClientTool]) -> None:
        self.items: list[dict[str, Any]] = []
        self._tools = tools
        self._suffix = suffix
        self._open: str = ""  # type of the last item, if it may still grow

    def add(self, pieces: Sequence[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case Text(text):
                    events += self._grow("message", "output_text", text)
                case Reasoning(text):
                    events += self._grow("reasoning", "reasoning_text", text)
                case ParsedCall(_, call_id, name):
                    events += [*self.close(), self._begin_call(call_id, name)]
                case Arguments(_, text):
                    field = _ARGUMENTS[self._open]
                    self.items[-1][field] += text
                    events.append(self._event(f"response.{self._open}_{field}.delta", delta=text))
        return events

    def settled(self, status: str) -> list[dict[str, Any]]:
        """The items as they will be once the last is closed."""
        items = [dict(item) for item in self.items]
        if self._open:
            items[-1]["status"] = status
        return items

    def close(self, status: str = "completed") -> list[Event]:
        """Complete the last item."""
        if not self._open:
            return []
        kind, self._open = self._open, ""
        item = self.items[-1]
        item["status"] = status
        events: list[Event] = []
        if field := _ARGUMENTS.get(kind):
            more = {"name": item["name"]} if kind == "function_call" else {}
            event_type = f"response.{kind}_{field}.done"
            events.append(self._event(event_type, **more, **{field: item[field]}))
        else:
            part = item["content"][0]
            event_type = f"response.{part['type']}.done"
            more = _NO_LOGPROBS if part["type"] == "output_text" else {}
            events.append(self._event(event_type, content_index=0, text=part["text"], **more))
            events.append(self._event("response.content_part.done", content_index=0, part=part))
        index = len(self.items) - 1
        done = {"type": "response.output_item.done", "output_index": index, "item": dict(item)}
        return [*events, done]

    def _grow(self, kind: str, part_type: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open != kind:
            events = [*self.close(), *self._begin_text(kind, part_type)]
        self.items[-1]["content"][0]["text"] += text
        more = _NO_LOGPROBS if part_type == "output_text" else {}
        event = self._event(f"response.{part_type}.delta", content_index=0, delta=text, **more)
        return [*events, event]

    def _begin_text(self, kind: str, part_type: str) -> list[Event]:
        part: dict[str, Any] = {"type": part_type, "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item = {"role": "assistant", "content": []}
        else:
            item = {"summary": [], "content": []}
        added = self._append(kind, "msg" if kind == "message" else "rs", item)
        self.items[-1]["content"] = [part]
        start = self._event("response.content_part.added", content_index=0, part=dict(part))
        return [added, start]

    def _begin_call(self, call_id: str, name: str) -> Event:
        tool = self._tools.get(name, ClientTool(name))
        item = {"call_id": call_id, "name": tool.name}
        if tool.namespace:
            item["namespace"] = tool.namespace
        kind, prefix = ("custom_tool_call", "ctc") if tool.custom else ("function_call", "fc")
        return self._append(kind, prefix, {**item, _ARGUMENTS[kind]: ""})

    def _append(self, kind: str, prefix: str, item: dict[str, Any]) -> Event:
        index = len(self.items)
        head = {"id": f"{prefix}_{self._suffix}_{index}", "type": kind}
        self._open = kind
        self.items.append({**head, **item, "status": "in_progress"})
        snapshot = dict(self.items[-1])
        return {"type": "response.output_item.added", "output_index": index, "item": snapshot}

    def _event(self, kind: str, **more: Any) -> Event:
        index = len(self.items) - 1
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": index, **more}
