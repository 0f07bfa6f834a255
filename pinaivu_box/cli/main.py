"""The `pinaivu` command; subcommands are imported when they are called, so that it starts fast."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pinaivu_box import __version__
from pinaivu_box.cli import colours
from pinaivu_box.cli.group import Group
from pinaivu_box.errors import BoxError

# Command -> where it is, and its line in `--help`, which is printed without importing it; those
# without a line are hidden.
COMMANDS = {
    "serve": ("serve:serve", "Serve the API (the default when started by build/run)."),
    "keys": ("keys:keys", "Create, list, change, rotate and revoke API keys."),
    "accounts": ("accounts:accounts", "Create, list and remove accounts."),
    "audit": ("audit:audit", "List who changed what."),
    "peers": ("peers:peers", "Join boxes into one network."),
    "usage": ("usage:usage", "Show usage and cost, by model or by other groups."),
    "ledger": ("ledger:ledger", "Show and settle what peers owe each other."),
    "id": ("identity:show", "Print the public key that verifies this box's receipts."),
    "receipts": ("receipts:receipts", "Show and verify receipts."),
    "run": ("run:run", "Chat with a model in the terminal."),
    "ls": ("ls:ls", "List the models that this box can serve."),
    "pull": ("pull:pull", "Download a model."),
    "search": ("pull:search", "List models that are known to work, or search the Hub."),
    "show": ("show:show", "Show what is known of a model."),
    "set": ("models:set_", "Set a model's default parameters."),
    "cp": ("models:cp", "Give a model another name."),
    "rm": ("models:rm", "Delete models, or other names of them."),
    "stop": ("models:stop", "Unload models from memory."),
    "ps": ("running:ps", "List the engines of the running box."),
    "upstreams": ("running:upstreams", "List the other servers that serve its models."),
    "backup": ("backup:backup", "Back up the box into one file."),
    "restore": ("backup:restore", "Restore a backup."),
    "update": ("update:update", "Update this executable to the newest release."),
    "doctor": ("doctor:doctor", "Check the box and its machine."),
    "verify-release": ("verify_release:verify_release", "Check downloaded files of a release."),
    "licenses": ("licenses:licenses", "Show the licences of all that is in this program."),
    "bench": ("bench:bench", "Measure a server, or compare two."),
    "service": ("service:service", "Run the box as a service of systemd."),
    "reload": ("running:reload", "Let the running box read its configuration again."),
    "completion": ("completion:completion", "Let Tab complete commands in bash, zsh or fish."),
    "chat-server": ("serve:chat_server", ""),
}


class LazyGroup(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (_, line) in COMMANDS.items() if line]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        imported = importlib.import_module(f"pinaivu_box.cli.{module}")
        command: click.Command = getattr(imported, attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        # Not `Group.shell_complete`, which imports all of them for the line.
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, COMMANDS[name][1]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pinaivu")
def cli() -> None:
    """Pinaivu Box: your own OpenAI-compatible API, with a signed receipt for every answer."""


def main() -> None:
    """Run the command; an error for users is one line on stderr, never a traceback."""
    # httpx tries to load a command line of its own, and with it Rich: it does without.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    if "_PINAIVU_COMPLETE" in os.environ:  # the script of a shell asks
        importlib.import_module("pinaivu_box.cli.completion")
    try:
        color = None if colours.are_wanted() else False
        cli.main(prog_name="pinaivu", standalone_mode=False, color=color)
    except BoxError as error:
        click.echo(f"pinaivu: {error.message}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has gone (`| head`).
        devnull = Path("/dev/null").open("w")  # noqa: SIM115 - lives until the exit
        sys.stdout = devnull
        sys.exit(1)
