"""The settings of a key as options of `keys create` and `keys edit`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

import click
import msgspec

from pinaivu_box import policy as policies
from pinaivu_box.cli.options import NONE, option_of, settings, span, whole_number
from pinaivu_box.errors import UsageError
from pinaivu_box.peering_config import RoutingPolicy
from pinaivu_box.policy import LOCAL_ONLY, LONGEST_LIFE, SCOPES, Policy


def _text(option: str, text: str, metavar: str = "N") -> click.Option:
    return click.Option([option], metavar=metavar, help=text)


def _repeatable(option: str, field: str, metavar: str, text: str) -> click.Option:
    text = f"{text}  Repeatable."
    return click.Option([option, field], multiple=True, metavar=metavar, help=text)


# The argument that each becomes is named as the field of `Policy`.
OPTIONS = (
    click.Option(
        ["--scope", "scopes"],
        multiple=True,
        type=click.Choice((*SCOPES, LOCAL_ONLY, NONE)),
        help="What the key may do; by default all but admin.  With local-only its requests never "
        "leave this box.  Repeatable.",
    ),
    _repeatable("--model", "models", "GLOB", 'Models that it may use, for example "llama*".'),
    _repeatable(
        "--network", "networks", "CIDR", "Client networks that may use it, such as 10.0.0.0/8."
    ),
    _repeatable("--peer", "peers", "NAME", "Peers that may serve its requests."),
    click.Option(
        ["--policy", "routing"],
        type=click.Choice((*get_args(RoutingPolicy), NONE)),
        help="Which box serves its requests, instead of [peering] policy; never: this box only.",
    ),
    _text("--rpm", "Maximum requests in any minute."),
    _text("--tpm", "Maximum tokens in any minute."),
    _text("--max-parallel", "Maximum requests that run at the same time."),
    _text("--max-queue", "Maximum requests that wait beyond these.  [default: 0]"),
    _text("--budget", 'Spending limit, for example "10 per 30d" or "10".', "AMOUNT"),
    _text("--weight", "Share of a busy engine relative to other keys.  [default: 1]"),
    click.Option(["--lenient/--no-lenient"], default=None, help="Deprecated: has no effect."),
    click.Option(
        ["--strict/--no-strict"],
        default=None,
        help="Reject request fields that are not supported; by default they are ignored and named "
        "in the answer.",
    ),
    click.Option(
        ["--audit"],
        type=click.Choice(("on", "off", NONE)),
        help="Whether what peers serve for it is audited now and then.  [default: on]",
    ),
    _repeatable(
        "--price",
        "prices",
        "GLOB=PRICES",
        "Price of 1,000 tokens by model: GLOB=PRICE or GLOB=PROMPT[/CACHED]/COMPLETION.",
    ),
)


def add_policy_options(command: click.Command) -> click.Command:
    command.params += OPTIONS
    return command


def with_options(policy: Policy, values: dict[str, Any]) -> Policy:
    """The policy with the settings of the options; lists are replaced.  Raises UsageError."""
    try:
        changed = policies.changed(policy, settings(values, _PARSERS))
        policies.check(changed)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        field = path.strip("`").partition("[")[0]
        raise UsageError(f"{option_of(field)}: {message[0].lower()}{message[1:]}.") from error
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    return changed


def expiry(text: str | None) -> int | None:
    """The end of a duration from now, in Unix milliseconds.  Raises UsageError."""
    if text is None or text == NONE:
        return None
    seconds = span("--expires", text)
    if not 0 < seconds <= LONGEST_LIFE:
        raise UsageError("--expires must be more than 0 and at most 36500d (100 years).")
    return int((time.time() + seconds) * 1000)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a number") from None


def _budget(text: str) -> Any:
    try:
        return msgspec.to_builtins(policies.parse_budget(text))
    except ValueError as error:
        raise ValueError(str(error).removeprefix("budget: ")) from error


def _price(text: str) -> tuple[str, Any]:
    glob, separator, prices = text.rpartition("=")
    parts = prices.split("/")
    if not separator or len(parts) > 3:
        raise ValueError(f"'{text}' is not GLOB=PRICE or GLOB=PROMPT[/CACHED]/COMPLETION")
    if len(parts) == 1:
        return glob, prices
    by_kind = {"prompt": parts[0], "completion": parts[-1]}
    return glob, {**by_kind, "cached": parts[1]} if len(parts) == 3 else by_kind


_PARSERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("rpm", "tpm", "max_parallel", "max_queue"), whole_number),
    "weight": _weight,
    "budget": _budget,
    "prices": lambda texts: dict(map(_price, texts)),
}
