"""The `pinaivu` command.  Commands are imported when they are called: `--version` is instant."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from pinaivu_box import __version__
from pinaivu_box.cli.group import Group
from pinaivu_box.errors import BoxError

# Command -> where it is and what it does (the text of `--help`, without importing it).
COMMANDS = {
    "serve": ("pinaivu_box.cli.serve:serve", "Serve the API (the default when run as build/run)."),
    "keys": ("pinaivu_box.cli.keys:keys", "Create, list, change, rotate and revoke API keys."),
    "accounts": ("pinaivu_box.cli.accounts:accounts", "Create, list and remove accounts."),
    "audit": ("pinaivu_box.cli.audit:audit", "Show who changed what."),
    "peers": ("pinaivu_box.cli.peers:peers", "Join boxes into one network."),
    "usage": ("pinaivu_box.cli.usage:usage", "Show what was used, by model."),
    "ledger": ("pinaivu_box.cli.ledger:ledger", "Show and settle what peers owe each other."),
    "id": ("pinaivu_box.cli.identity:show", "Print the node key that receipts are verified with."),
    "receipts": ("pinaivu_box.cli.receipts:receipts", "Show and verify receipts."),
    "ls": ("pinaivu_box.cli.models:ls", "List the models that this box can serve."),
    "pull": ("pinaivu_box.cli.pull:pull", "Copy a model from another box."),
    "ps": ("pinaivu_box.cli.models:ps", "List the engines of the running box."),
    "backup": ("pinaivu_box.cli.backup:backup", "Back up the box into one file."),
    "restore": ("pinaivu_box.cli.backup:restore", "Restore a backup."),
    "doctor": ("pinaivu_box.cli.doctor:doctor", "Check the box and its machine."),
    "bench": ("pinaivu_box.cli.bench:bench", "Measure a server, or two against each other."),
    "reload": (
        "pinaivu_box.cli.reload:reload",
        "Let the running box read its settings again.",
    ),
    "engine": ("pinaivu_box.cli.engine:engine", ""),
    "sandbox": ("pinaivu_box.cli.sandbox:sandbox", ""),
}
HIDDEN = {"engine", "sandbox"}


class LazyGroup(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if name not in HIDDEN]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, COMMANDS[name][1]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pinaivu")
def cli() -> None:
    """Pinaivu Box: your own OpenAI-compatible API, with a signed receipt for every answer."""


def main() -> None:
    """Run the command; a user's mistake is one line on stderr, never a traceback."""
    try:
        cli.main(prog_name="pinaivu", standalone_mode=False)
    except BoxError as error:
        click.echo(f"pinaivu: {error.message}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say.
        devnull = Path("/dev/null").open("w")  # noqa: SIM115 - lives until the exit
        sys.stdout = devnull
        sys.exit(1)
