"""Other names for models: those of the configuration, and those that were made since, which a file
in the home holds.  An alias leads to a model, never to another alias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pinaivu_box.errors import CliError
from pinaivu_box.models import home_file
from pinaivu_box.models.names import RULE, is_model_id, printable, spellings

FILE_NAME = "aliases.json"
MAX_ALIASES = 1000  # that were made


@dataclass(frozen=True)
class Aliases:
    """The ids of models by alias.  Those that are `configured` count before those that were
    `made`."""

    configured: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)

    def items(self) -> list[tuple[str, str]]:
        """Return each alias and where it leads, by name."""
        return sorted({**self.made, **self.configured}.items())

    def named(self, name: str) -> str | None:
        """Return the alias of that name; one without a tag and one with `:latest` are the same."""
        for spelling in spellings(name):
            if spelling in self.configured or spelling in self.made:
                return spelling
        return None

    def target_of(self, name: str) -> str | None:
        """Return the id of the model that an alias leads to; None if the name is no alias."""
        alias = self.named(name)
        return None if alias is None else self.configured.get(alias) or self.made[alias]

    def of(self, model_id: str) -> list[str]:
        """Return the aliases that lead to a model, by name."""
        wanted = spellings(model_id)
        return [alias for alias, target in self.items() if target in wanted]


def read(configured: Mapping[str, str], home: Path) -> Aliases:
    """Return the aliases of a box.  Raises CliError if they are not valid."""
    path = home / FILE_NAME
    made = home_file.read(path, dict[str, str], {})
    if len(made) > MAX_ALIASES or not all(map(is_model_id, [*made, *made.values()])):
        raise home_file.unreadable(path, ValueError("it does not hold names of models"))
    aliases = Aliases(configured, made)
    for alias, target in configured.items():
        _check(alias, target, aliases)
    return aliases


def write(made: Mapping[str, str], home: Path) -> None:
    """Store the aliases that were made.  Raises OSError."""
    home_file.write(home / FILE_NAME, made)


def _check(alias: str, target: str, aliases: Aliases) -> None:
    """Raises CliError."""
    for name in (alias, target):
        if not is_model_id(name):
            raise CliError(f"aliases: '{printable(name, 80)}' is not a name of a model ({RULE}).")
    other = aliases.configured.get(target)
    if other is not None or target == alias:
        raise CliError(
            f'aliases: "{alias}" leads to "{target}", which is an alias too: name the model'
            f"{f' ({other})' if other else ''}."
        )
