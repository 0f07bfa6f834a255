"""`pinaivu completion`: what a shell runs so that Tab completes commands, options and names."""

from __future__ import annotations

import os

import click
from click import shell_completion

SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "pinaivu"
VARIABLE = "_PINAIVU_COMPLETE"  # is set by the scripts

# Unlike click's, it gives the line as it was typed: bash takes words apart at each ":", of which
# names of models have one, and replaces only what comes after the last.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT} cut="" response completion type value
    local word=${line##* }
    [[ $COMP_WORDBREAKS == *:* && $word == *:* ]] && cut=${word%%"${word##*:}"}
    response=$(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1" 2>/dev/null)
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$cut"}") ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@shell_completion.add_completion_class
class LineBashComplete(shell_completion.BashComplete):
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMP_LINE", "")
        words = shell_completion.split_arg_string(line)[1:]
        incomplete = "" if not words or line[-1:].isspace() else words.pop()
        return words, incomplete


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that lets bash, zsh or fish complete commands.

    \b
    bash:  echo 'source <(pinaivu completion bash)' >> ~/.bashrc
    zsh:   echo 'source <(pinaivu completion zsh)' >> ~/.zshrc    (after compinit)
    fish:  pinaivu completion fish > ~/.config/fish/completions/pinaivu.fish

    Tab then completes commands, options, and the names of keys, accounts, models and peers.
    """
    kind = shell_completion.get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    made = kind(root, {}, _PROGRAM, VARIABLE)
    # Not `source()`, which runs bash to look at its version.
    click.echo(kind.source_template % made.source_vars())
