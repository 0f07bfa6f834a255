"""The playground's request as curl, Python and Node: each sends what the playground sends, whatever
was typed into it.  The script that writes them is run by Node."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

STATIC = Path(__file__).parents[1] / "pinaivu_box" / "server" / "static"
BASE = "http://box.lan:4001/v1"
BODY: dict[str, Any] = {
    "model": "qwen3:4b",
    "messages": [
        {"role": "system", "content": 'It\'s "quoted" \\ and $HOME `id` $(id)'},
        {"role": "user", "content": "two\nlines\u2028 and \U0001f600, 'and' </script>\n"},
    ],
    "temperature": 0.5,
    "stop": ["'", "\n"],
    "response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": {}}},
    "logprobs": True,
}
SENT = {**BODY, "stream": True}

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("samples")
    shutil.copy(STATIC / "request_samples.js", folder / "request_samples.mjs")
    (folder / "run.mjs").write_text(
        'import { samples } from "./request_samples.mjs";\n'
        f"const [base, body] = [{json.dumps(BASE)}, {json.dumps(BODY)}];\n"
        "const made = Object.entries(samples).map(([name, write]) => [name, write(base, body)]);\n"
        "console.log(JSON.stringify(Object.fromEntries(made)));\n"
    )
    done = subprocess.run(
        ["node", str(folder / "run.mjs")], capture_output=True, text=True, check=True, timeout=60
    )
    made: dict[str, str] = json.loads(done.stdout)
    return made


def test_curl_sends_it_through_a_shell(samples: dict[str, str]) -> None:
    command = samples["curl"].replace('"Authorization: Bearer $PINAIVU_API_KEY"', "KEY")
    words = shlex.split(command)
    assert f"{BASE}/chat/completions" in words
    assert json.loads(words[words.index("-d") + 1]) == SENT


def test_python_sends_it(samples: dict[str, str]) -> None:
    calls = [node for node in ast.walk(ast.parse(samples["python"])) if isinstance(node, ast.Call)]
    (create,) = (call for call in calls if len(call.keywords) > 2)
    sent = {str(each.arg): ast.literal_eval(each.value) for each in create.keywords}
    assert sent == SENT
    assert f'base_url="{BASE}"' in samples["python"]


def test_node_sends_it(samples: dict[str, str], tmp_path: Path) -> None:
    text = samples["node"]
    begin = text.index("create(") + len("create(")
    literal = text[begin : text.index(");\nfor await")]
    program = tmp_path / "sent.mjs"
    program.write_text(f"console.log(JSON.stringify({literal}));\n")
    done = subprocess.run(
        ["node", str(program)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == SENT
    assert f"baseURL: {json.dumps(BASE)}" in text
