"""The configuration: the sample is the defaults, and the nearest source wins."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_box.config import (
    ENVIRONMENT,
    Config,
    ModelConfig,
    SamplingConfig,
    default_home,
    load,
    parse_duration,
)
from pinaivu_box.engine.messages import Sampling
from pinaivu_box.errors import CliError
from pinaivu_box.upstream_config import UpstreamConfig
from tests.support.process_box import Box

SAMPLE = Path(__file__).parent.parent / "sample.toml"
LISTED: dict[str, type[msgspec.Struct]] = {"model": ModelConfig, "upstream": UpstreamConfig}
COMMENTED = re.compile(r'^# (\[\[?[\w.]+\]\]?|[\w".:]+ = .+)$', re.MULTILINE)


def uncommented() -> dict[str, Any]:
    """The sample with its commented settings switched on."""
    return tomllib.loads(COMMENTED.sub(r"\1", SAMPLE.read_text()))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "box.toml"
    path.write_text(text)
    return path


# -- the sample ----------------------------------------------------------------------------------


def test_the_sample_is_exactly_the_defaults() -> None:
    assert load(SAMPLE, environ={}) == Config()
    assert load(None, environ={}) == Config()


def settings(struct: type[msgspec.Struct], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every setting below a struct; tables of tables are walked."""
    for field in msgspec.structs.fields(struct):
        path = (*at, field.name)
        inner: type[msgspec.Struct] | None = None
        if not at and field.name in LISTED:
            inner = LISTED[field.name]
        if isinstance(field.default, msgspec.Struct):
            inner = type(field.default)
        if inner and path != ("model", "sampling"):  # as [sampling], which is walked itself
            yield from settings(inner, path)
        else:
            yield path


def test_every_setting_is_in_the_sample() -> None:
    tree = uncommented()
    tree |= {name: tree[name][0] for name in LISTED}
    paths = list(settings(Config))
    assert len(paths) >= 25
    for path in paths:
        node: Any = tree
        for name in path:
            assert name in node, f"{'.'.join(path)} is not in sample.toml"
            node = node[name]


def test_the_commented_lines_of_the_sample_are_valid_and_have_the_defaults(tmp_path: Path) -> None:
    defaults = {name: getattr(Sampling(), name) for name in SamplingConfig.__struct_fields__}
    assert uncommented()["sampling"] == defaults
    config = load(written(tmp_path, COMMENTED.sub(r"\1", SAMPLE.read_text())), environ={})
    assert config.sampling == SamplingConfig(**defaults)
    (model,) = config.model
    assert model.context == ModelConfig(name="", path="").context
    assert config.pricing.models
    (upstream,) = config.upstream
    unlike = {"name", "url", "key_env", "price", "prices"}
    for name in set(UpstreamConfig.__struct_fields__) - unlike:
        default = getattr(UpstreamConfig(name="", url=""), name)
        assert getattr(upstream, name) == default, name
    rest = {
        "sampling": SamplingConfig(), "model": [], "upstream": [], "pricing": Config().pricing,
    }  # fmt: skip
    assert msgspec.structs.replace(config, **rest) == Config()


def test_the_sample_names_every_environment_variable() -> None:
    for variable in ENVIRONMENT:
        assert f"[{variable}]" in SAMPLE.read_text()


# -- who wins ------------------------------------------------------------------------------------

# Variable -> (what the file, the environment and the command line say; what a program then sees)
SAID: dict[str, tuple[Any, str, Any]] = {
    "PINAIVU_HOST": ("10.0.0.1", "10.0.0.2", "10.0.0.3"),
    "PINAIVU_PORT": (5001, "5002", 5003),
    "PINAIVU_MODELS": ("/file", "/env", "/option"),
    "PINAIVU_KEEP_ALIVE": ("1m", "2m", "3m"),
    "PINAIVU_MAX_QUEUE": (1, "2", 3),
    "PINAIVU_PEERING_ENABLED": (True, "false", True),
    "PINAIVU_PEERING_PORT": (5001, "5002", 5003),
    "PINAIVU_LOG_LEVEL": ("debug", "warning", "error"),
    "PINAIVU_LOG_FORMAT": ("json", "text", "json"),
}


def test_the_table_above_has_every_variable() -> None:
    assert set(SAID) == set(ENVIRONMENT)


@pytest.mark.parametrize("variable", SAID)
def test_options_win_over_environment_over_file_over_default(tmp_path: Path, variable: str) -> None:
    in_file, in_environment, in_options = SAID[variable]
    keys = ENVIRONMENT[variable]
    table = f"[{keys[0]}]\n" if len(keys) == 2 else ""
    path = written(tmp_path, f"{table}{keys[-1]} = {json.dumps(in_file)}\n")

    def seen(**sources: Any) -> Any:
        node: Any = load(**{"path": None, "environ": {}, **sources})
        for key in keys:
            node = getattr(node, key)
        return node

    environ = {variable: in_environment}
    assert seen() not in (in_file,)
    assert seen(path=path) == in_file
    assert str(seen(path=path, environ=environ)).lower() == in_environment
    assert seen(path=path, environ=environ, overrides={keys: in_options}) == in_options
    environ_only = seen(path=path, environ=environ, overrides={keys: None})
    assert str(environ_only).lower() == in_environment


def test_a_running_server_obeys_the_same_order(tmp_path: Path, new_box: Callable[..., Box]) -> None:
    """The log's format, which shows what was taken: file, then environment, then option."""
    path = written(tmp_path, '[log]\nformat = "json"\nlevel = "info"\n')

    def is_json(*args: str, env: dict[str, str] | None = None) -> bool:
        box = new_box("--config", str(path), *args, env=env)
        box.http("GET", "/v1/models")
        assert box.stop() == 0
        (kind,) = {line.startswith("{") for line in box.errors.splitlines()}
        return kind

    assert is_json()
    assert not is_json(env={"PINAIVU_LOG_FORMAT": "text"})
    assert is_json("--log-format", "json", env={"PINAIVU_LOG_FORMAT": "text"})


def test_models_of_the_command_line_join_those_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[[model]]\nname = "a:1"\npath = "x"\n')
    extra = [ModelConfig(name="b:1", path="y")]
    config = load(path, environ={}, extra_models=extra)
    assert [model.name for model in config.model] == ["a:1", "b:1"]
    with pytest.raises(CliError, match="twice"):
        load(path, environ={}, extra_models=[ModelConfig(name="a:1", path="y")])


def test_the_home_is_the_named_one_or_the_platforms() -> None:
    assert default_home({"PINAIVU_HOME": "/srv/box"}) == Path("/srv/box")
    assert default_home({}).name == "pinaivu"
    assert default_home({"PINAIVU_HOME": ""}) == default_home({})


# -- durations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25), ("90s", 90), ("5m", 300), ("12h", 43_200), ("30d", 2_592_000),
        ("90", 90), ("0", 0), ("-1", -1), ("-1m", -60), ("1.5h", 5400), (" 5 m ", 300),
    ],
)  # fmt: skip
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.integers(0, 365_250), st.sampled_from([("s", 1), ("m", 60), ("h", 3600), ("d", 86400)]))
def test_a_duration_is_number_times_unit(number: int, unit: tuple[str, int]) -> None:
    assert parse_duration(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize(
    "text",
    ["", " ", "m", "5 weeks", "5m30s", "1e3", "5M", "nan", "inf", "--1", "1.", ".5", "5m\n5"],
)
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("rate", ["0", "0.1", "2.5"])
def test_copies_have_no_limit_or_one_that_a_piece_gets_through(tmp_path: Path, rate: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[peering.serve]\ncopy_mb_per_s = {rate}\n")
    assert load(file, environ={}).peering.serve.copy_mb_per_s == float(rate)
    file.write_text("[peering.serve]\ncopy_mb_per_s = 0.05\n")
    with pytest.raises(CliError, match=r"copy_mb_per_s is 0\.05"):
        load(file, environ={})


@pytest.mark.parametrize("entry", ["{}", '{ text = "a", file = "b" }', '{ text = " " }'])
def test_a_shared_prefix_is_a_text_or_a_file(tmp_path: Path, entry: str) -> None:
    path = written(tmp_path, f"[engine]\nshared_prefixes = [{entry}]\n")
    with pytest.raises(CliError, match=r"engine\.shared_prefixes.* either a text or a file"):
        load(path, environ={})
    many = written(tmp_path, "[engine]\nshared_prefixes = [" + '{ text = "a" },' * 65 + "]\n")
    with pytest.raises(CliError, match="shared_prefixes"):
        load(many, environ={})


@pytest.mark.parametrize("relay", ["none", "n0", "https://relay.example", "http://10.0.0.1:3340/"])
def test_a_relay_is_none_theirs_or_a_url(tmp_path: Path, relay: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[peering]\nrelay = "{relay}"\n')
    assert load(file, environ={}).peering.relay == relay


@pytest.mark.parametrize(
    "relay",
    ["", "relay.example", "https://", "http://:3340", "ftp://relay.example", "https://a b",
     "https://relay.example:99999", "http://[::1", "https://" + "relay." * 20 + "example"],
)  # fmt: skip
def test_an_invalid_relay_is_refused_in_one_sentence(tmp_path: Path, relay: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[peering]\nrelay = "{relay}"\n')
    with pytest.raises(CliError) as caught:
        load(file, environ={})
    said = caught.value.message
    assert f"peering.relay is '{relay}'" in said and said.endswith("https://HOST:PORT.")
    assert "\n" not in said
