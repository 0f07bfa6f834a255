"""A group of commands that suggests similar names for one that does not exist."""

from __future__ import annotations

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
        import difflib

        commands = self.list_commands(ctx)
        similar = difflib.get_close_matches(name.lower(), commands, n=2, cutoff=0.6)
        suggestions = [*self._subcommands(ctx, name), *similar][:3]
        if suggestions:
            return f" Did you mean {' or '.join(suggestions)}?"
        return f" The commands are: {', '.join(commands)}."

    def _subcommands(self, ctx: click.Context, name: str) -> list[str]:
        """The commands with that name in the groups of this one."""
        groups = {group: self.get_command(ctx, group) for group in self.list_commands(ctx)}
        return [
            f"{group} {name}"
            for group, command in groups.items()
            if isinstance(command, click.Group) and name in command.commands
        ]
