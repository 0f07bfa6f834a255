"""What the fake model says to the programs of `tests/clients/run`, there and in the replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASK = "Write made.txt for {program}, then count its bytes."
TEXT = "hello\n"
COUNTED = "6 made.txt"  # what `wc -c made.txt` prints
DONE = "It has 6 bytes."
CODEX_MODELS = ("gpt-5.5", "gpt-6-astra")  # what Codex knows of them is said of ours
_RESULT, _TOOLS = "<tool_response>", "You can call these functions"  # in words of the template


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def lines(folder: str) -> list[dict[str, Any]]:
    """The script for programs that work in `folder`; what comes first goes first.  A call's
    arguments are in the order of the tool's schema, which its grammar insists on."""
    made = f"{folder}/made.txt"
    patch = f"*** Begin Patch\n*** Add File: made.txt\n+{TEXT}*** End Patch"
    agents = {
        "Claude Code": [
            call("Write", file_path=made, content=TEXT),
            call("Bash", command="wc -c made.txt", description="Count"),
        ],
        "Codex": [
            call("exec_command", cmd=f"apply_patch <<'EOF'\n{patch}\nEOF"),
            call("exec_command", cmd="wc -c made.txt"),
        ],
        CODEX_MODELS[0]: [
            call("apply_patch", input=patch),
            call("exec_command", cmd="wc -c made.txt"),
        ],
        CODEX_MODELS[1]: [
            call("functions__exec", input=f"text(await tools.apply_patch({_json(patch)}))"),
            call(
                "functions__exec", input='text(await tools.exec_command({cmd: "wc -c made.txt"}))'
            ),
        ],
        "opencode": [
            call("write", content=TEXT, filePath=made),
            call("bash", command="wc -c made.txt"),
        ],
        "Continue": [
            call("Write", filepath=made, content=TEXT),
            call("Bash", command="wc -c made.txt"),
        ],
    }
    said = [(["Generate a title for this conversation"], "Counting bytes")]
    codex = TASK.format(program="Codex")
    said += [
        ([codex, "invalid agent id"], DONE),
        ([codex, COUNTED], call("multi_agent_v1__close_agent", target="nobody")),
    ]
    for program, (write, count) in agents.items():
        task = TASK.format(program=program)
        said += [([task, COUNTED], DONE), ([task, _RESULT], count), ([task], write)]
    said += [
        (["commit message"], "Add made.txt"),
        ([TASK.format(program="aider")], f"made.txt\n```\n{TEXT}```\n"),
        (["How many days", _RESULT], "Three days of rain."),
        (["How many days"], call("weather", city="Rome")),
        (["as an object", _TOOLS], call("json", **_COLOUR)),  # the SDK's own tool
        (["as an object"], _json(_COLOUR)),
        *_LANGCHAIN,
        ([], "Hello!"),
    ]
    return [{"when": when, "say": say} for when, say in said]


_COLOUR = {"red": 1, "green": 2, "blue": 3}
_JOKE = {"setup": "Why do cats sit on keys?", "punchline": "To be heard."}
# What the standard tests of LangChain want.
_LANGCHAIN: list[tuple[list[str], str]] = [
    (["What is 3 + 4"], call("my_adder_tool", a=3, b=4)),
    (["San Francisco", _RESULT], "It is sunny."),
    (["San Francisco"], call("get_weather", location="San Francisco")),
    (["magic_function_no_args()"], call("magic_function_no_args")),
    (["magic_function"], call("magic_function", input=3)),
    (["Pirate greeting"], call("greeting_generator", answer_style="pirate")),
    (
        ["你好啊集团"],
        call("unicode_customer", customer_name="你好啊集团", description="Technology"),
    ),
    (["こんにちは"], call("unicode_customer", customer_name="こんにちは株式会社", description="A")),
    (["joke about cats", _TOOLS, '"JokeDict"'], call("JokeDict", **_JOKE)),
    (["joke about cats", _TOOLS], call("Joke", **_JOKE)),
    (["joke about cats"], _json(_JOKE)),
]


def words() -> list[str]:
    """What the lines look for."""
    return sorted({word for line in lines("") for word in line["when"]})


def write(path: Path, folder: str) -> Path:
    path.write_text(_json(lines(folder)))
    return path
