"""The question of a first start: whether to pull a model, where there is only the bundled one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pinaivu_box.config import Config
from pinaivu_box.errors import BoxError
from pinaivu_box.text import megabytes

_DECLINED = "no-first-model"  # a file in the home: the question was answered with no


def offer(config: Config, home: Path) -> str:
    """Ask on a terminal for a model that a box without models is to pull; "" if there is nothing to
    ask, or for no, after which nobody is asked again."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or (home / _DECLINED).exists():
        return ""
    if config.peering.enabled or config.upstream or not _has_bundled_alone(config, home):
        return ""
    from pinaivu_box.home import prepare_home
    from pinaivu_box.models import known_models, memory

    model = known_models.first(memory.available())
    click.echo(
        "This box has only the small model that came with it, which is for trying.", err=True
    )
    question = f"Pull {model.name} ({model.purpose}; {megabytes(model.size)}, {model.license})?"
    if click.confirm(question, default=True, err=True):
        return model.name
    (prepare_home(home) / _DECLINED).touch()
    return ""


def _has_bundled_alone(config: Config, home: Path) -> bool:
    from pinaivu_box.models import catalog_loader

    return all(model.owner == "bundled" for model in catalog_loader.load(config, home).models)


async def pull(box: Any, name: str) -> None:
    """Pull it, and say so; a failure stops nothing."""
    import msgspec

    from pinaivu_box.cli.pull import PullBar
    from pinaivu_box.model_admin import pull as pulling
    from pinaivu_box.store.audit import Actor

    try:
        wanted = pulling.Pull(model=name)
        lines = await pulling.by_name(box, wanted, Actor("first start", "local"))
        with PullBar(name) as bar:
            async for line in lines:
                bar.show(msgspec.to_builtins(line))
        failure = line.message if line.state == "failed" else ""
    except BoxError as error:
        failure = error.message
    if failure:
        click.echo(f"pinaivu: {failure}  'pinaivu pull {name}' tries again.", err=True)
