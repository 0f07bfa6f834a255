"""Model names as users write them, and where each leads.

| name | leads to |
| --- | --- |
| `llama3.2:1b`, `USER/NAME:TAG` | Ollama's registry |
| `hf.co/OWNER/REPO[:QUANT]` | the Hugging Face Hub; a quantisation, or the name of a file |
| `HOST/PATH/NAME[:TAG]` | any OCI registry; `HOST` has a dot or a port, or is `localhost` |
| `https://HOST/PATH/FILE.gguf` | that file |
| `/PATH/FILE.gguf`, `./FILE.gguf`, `~/FILE.gguf` | a file of this machine |

Each leads to one id, under which the model is served: the name itself with its tag, or the name of
the file.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from pinaivu_box.config import RegistryConfig
from pinaivu_box.errors import PullFailed, quoted
from pinaivu_box.models import splits
from pinaivu_box.models.names import RULE, is_model_id

LATEST = "latest"
_HUB_HOSTS = ("hf.co", "huggingface.co")
_OLLAMA_HOSTS = ("ollama.com", "registry.ollama.ai")
_SCHEMES = ("http://", "https://")
_LIBRARY = "library"  # where Ollama's registry keeps models without an owner
# A path component and a tag of the OCI distribution specification; upper case as Ollama and the Hub
# have it too.
_COMPONENT = re.compile(r"[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:]+\](?::[0-9]{1,5})?")


@dataclass(frozen=True)
class RegistryModel:
    """A tag of a repository in an OCI registry, at the base URL `base`."""

    id: str
    base: str
    repository: str
    tag: str


@dataclass(frozen=True)
class HubModel:
    """A repository of the Hub, at the base URL `base`.  `choice` is a quantisation or the name of a
    file; empty for the usual one."""

    id: str
    base: str
    repository: str
    choice: str


@dataclass(frozen=True)
class UrlModel:
    """A file at a URL."""

    id: str
    url: str


@dataclass(frozen=True)
class LocalModel:
    """A file of this machine."""

    id: str
    path: Path


Reference = RegistryModel | HubModel | UrlModel | LocalModel


def parse(text: str, config: RegistryConfig, name: str | None = None) -> Reference:
    """Return where a name leads; `name` is another id for the model.  Raises PullFailed."""
    reference = _parsed(text, config)
    model_id = reference.id if name is None else _tagged(name)
    if not is_model_id(model_id):
        raise PullFailed(f"'{quoted(model_id)}' cannot be the id of a model ({RULE}): use --as.")
    return replace(reference, id=model_id)


def _parsed(text: str, config: RegistryConfig) -> Reference:
    if text.startswith(_SCHEMES):
        return _url(text)
    if text.startswith(("/", "./", "../", "~")):
        path = Path(text).expanduser()
        return LocalModel(_id_of_file(path.name, text), path.absolute())
    _check(text, not text.endswith(":"))
    path_text, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:  # the colon is that of a port
        path_text, tag = text, ""
    host, _, rest = path_text.partition("/")
    if not rest or not _is_host(host):
        return _ollama(text, path_text, tag, config.ollama)
    if host in _HUB_HOSTS:
        return _hub(text, rest, tag, config.hub)
    if host in _OLLAMA_HOSTS:
        return _ollama(text, rest, tag, config.ollama)
    base = f"{'http' if is_loopback(host) else 'https'}://{host}"
    _check(text, _HOST.fullmatch(host), _is_path(rest), _is_tag(tag))
    tag = tag or LATEST
    return RegistryModel(f"{host.replace(':', '_')}/{rest}:{tag}", base, rest, tag)


def host_of(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def is_loopback(host: str) -> bool:
    """Whether `HOST[:PORT]` is this machine, where a registry may speak plain HTTP."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    """Whether the first part of a path is a host, by the rule of Docker's references."""
    return "." in text or ":" in text or text == "localhost"


def _ollama(text: str, path: str, tag: str, base: str) -> RegistryModel:
    repository = path if "/" in path else f"{_LIBRARY}/{path}"
    _check(text, _is_path(path), path.count("/") <= 1, _is_tag(tag))
    tag = tag or LATEST
    name = path.removeprefix(f"{_LIBRARY}/")
    return RegistryModel(f"{name}:{tag}", base, repository, tag)


def _hub(text: str, path: str, choice: str, base: str) -> HubModel:
    _check(text, _is_path(path), path.count("/") == 1, _is_tag(choice))
    tag = choice.removesuffix(".gguf") or LATEST
    return HubModel(f"hf.co/{path}:{tag}", base, path, choice)


def _url(text: str) -> UrlModel:
    try:
        parts = urlsplit(text)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        raise _bad(text) from None
    if not parts.hostname or not parts.path.lower().endswith(".gguf"):
        raise PullFailed(f"'{quoted(text)}' is not the URL of a .gguf file.")
    if parts.username is not None:
        raise PullFailed("A URL with a password in it would be stored and shown: leave it out.")
    if parts.scheme == "http" and not is_loopback(host):
        raise PullFailed(f"{quoted(text)} is not protected on its way: use https.")
    name = PurePosixPath(unquote(parts.path)).name
    return UrlModel(_id_of_file(name, text), text)


def _id_of_file(name: str, text: str) -> str:
    if not name.lower().endswith(".gguf"):
        raise PullFailed(f"'{quoted(text)}' is not the name of a .gguf file.")
    return _tagged(splits.stem_of(name))


def _tagged(name: str) -> str:
    return name if ":" in name else f"{name}:{LATEST}"


def _is_path(text: str) -> bool:
    return all(map(_COMPONENT.fullmatch, text.split("/")))


def _is_tag(text: str) -> bool:
    return not text or _TAG.fullmatch(text) is not None


def _check(text: str, *conditions: object) -> None:
    if not all(conditions):
        raise _bad(text)


def _bad(text: str) -> PullFailed:
    return PullFailed(
        f"'{quoted(text)}' is not the name of a model: write NAME:TAG, USER/NAME:TAG, "
        "hf.co/OWNER/REPO:QUANT, HOST/PATH/NAME:TAG, the URL of a .gguf file, or its path."
    )
