"""What `pinaivu serve` prints when it serves: in 80 columns, without colours, to be pasted from."""

from __future__ import annotations

import asyncio
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pinaivu_box import __version__
from pinaivu_box.graphics_cards import graphics_cards
from pinaivu_box.text import megabytes

if TYPE_CHECKING:
    from pinaivu_box.devices import Device, DeviceMonitor

_COLUMNS = 80
_INDENT = 12  # of what stands right of the names
_MAX_MODEL_LINES = 4
_MAX_ADDRESSES = 3
_DEVICE_SECONDS = 10.0  # the server does not wait longer for a driver


def banner(
    url: str,
    home: Path,
    models: list[str],
    secret: str | None,
    devices: str = "",
    *,
    others: Sequence[str] = (),
    on_lan: bool = True,
    fingerprint: str = "",
    self_signed: Path | None = None,
    link: str = "",
) -> str:
    """`others` are URLs at which the box is reached too; without `on_lan` only this machine reaches
    it.  `fingerprint` is that of the certificate, empty without TLS; `self_signed` the file of one
    that the box has made, which no client knows by itself; `link` the one-time link for the first
    login."""
    lines = [f"Pinaivu Box {__version__}", "", *_row("Base URL", f"{url}/v1")]
    if others:
        lines += _row("Also at", *(f"{other}/v1" for other in others[:_MAX_ADDRESSES]))
    elif not on_lan:
        lines += _row("LAN", "not served: --host 0.0.0.0 serves other machines too")
    lines += _row("Pages", f"{url}/")
    if self_signed is not None:
        lines += _row("TLS", f"clients need {self_signed}")
    if fingerprint:  # in two lines, as it has 95 characters
        lines += _row("SHA-256", fingerprint[:47], fingerprint[48:])
    if secret:
        lines += _row("API key", secret, "(shown only once: store it now)")
    if link:
        # On a line of its own: with its token it has 75 characters.
        lines += ["  Log in", f"  {link}", f"{'':{_INDENT}}(works once, for 15 minutes)"]
    lines += _row("Models", *(_listed(models) or [f"none: put a GGUF file into {home / 'models'}"]))
    if devices:
        lines += _row("Devices", *_wrapped(devices))
    lines += _row("Home", str(home))
    return "\n".join(lines) + "\n\n" + _examples(f"{url}/v1", secret, models, self_signed)


def _row(name: str, *lines: str) -> list[str]:
    first, *more = lines
    return [f"  {name:{_INDENT - 2}}{first}", *(f"{'':{_INDENT}}{line}" for line in more)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS - _INDENT, break_long_words=False, break_on_hyphens=False)


def _listed(models: list[str]) -> list[str]:
    """As many models as fit the lines, and how many more there are."""
    lines = _wrapped(", ".join(models[: _COLUMNS * _MAX_MODEL_LINES]))[:_MAX_MODEL_LINES]
    if more := len(models) - sum(len(line.removesuffix(",").split(", ")) for line in lines):
        lines.append(f"and {more} more ('pinaivu ls' lists them)")
    return lines


def _examples(base: str, secret: str | None, models: list[str], certificate: Path | None) -> str:
    """`certificate` is one that clients do not know by themselves."""
    export = f"    export PINAIVU_API_KEY={secret}\n" if secret else ""
    trust = ""
    if certificate is not None:
        # Python's clients take it from the environment.
        trust = ' --cacert "$SSL_CERT_FILE" \\\n     '
        export += f"    export SSL_CERT_FILE={shlex.quote(str(certificate))}\n"
    python_key = f'"{secret}"' if secret else 'os.environ["PINAIVU_API_KEY"]'
    imports = "" if secret else "    import os\n"
    model = models[0] if models else "MODEL"
    return f"""Try it with curl:

{export}    curl{trust} {base}/chat/completions \\
      -H "Authorization: Bearer $PINAIVU_API_KEY" \\
      -H "Content-Type: application/json" \\
      -d '{{"model": "{model}",
           "messages": [{{"role": "user", "content": "Hello!"}}]}}'

or with Python (pip install openai):

{imports}    from openai import OpenAI
    client = OpenAI(
        base_url="{base}",
        api_key={python_key},
    )
    answer = client.chat.completions.create(
        model="{model}",
        messages=[{{"role": "user", "content": "Hello!"}}],
    )
    print(answer.choices[0].message.content)
"""


async def describe_devices(monitor: DeviceMonitor, seconds: float = _DEVICE_SECONDS) -> str:
    """What models run on.  A machine that may have GPUs asks a child, which goes on by itself if it
    takes long."""
    listing = asyncio.ensure_future(monitor.read())
    done, _ = await asyncio.wait({listing}, timeout=seconds)
    if not done:
        return "still being listed: 'pinaivu ps --devices' shows them"
    if gpus := [device for device in listing.result() if device.is_gpu]:
        return ", ".join(map(_described, gpus))
    cpu = next((device.description for device in listing.result()), "CPU")
    if monitor.failure or graphics_cards():
        return f"{cpu}; no GPU can be used: 'pinaivu doctor' says why"
    return f"{cpu} (no GPU)"


def _described(device: Device) -> str:
    name = device.status.name if device.status is not None else device.description
    return f"{device.name} {name}, {megabytes(device.total)}"
