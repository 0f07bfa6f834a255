"""Groups of commands that name the nearest one where somebody mistypes it."""

from __future__ import annotations

import difflib

import click


class Group(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises click.UsageError."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            ctx.fail(f"No such command '{name}'.{self._hint(ctx, name)}")
        return super().resolve_command(ctx, args)

    def _hint(self, ctx: click.Context, name: str) -> str:
        near = difflib.get_close_matches(name.lower(), self.list_commands(ctx), n=2, cutoff=0.6)
        near = [*self._elsewhere(ctx, name), *near][:3]
        if near:
            return f" Did you mean {' or '.join(near)}?"
        return f" There are: {', '.join(self.list_commands(ctx))}."

    def _elsewhere(self, ctx: click.Context, name: str) -> list[str]:
        """Commands of that name in the groups inside."""
        groups = {one: self.get_command(ctx, one) for one in self.list_commands(ctx)}
        return [
            f"{one} {name}"
            for one, group in groups.items()
            if isinstance(group, click.Group) and name in group.commands
        ]
