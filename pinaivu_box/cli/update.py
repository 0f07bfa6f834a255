"""`pinaivu update`: another version of the executable, on request only."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from pinaivu_box import __version__
from pinaivu_box.cli.call import Call
from pinaivu_box.cli.options import standard_options
from pinaivu_box.errors import UpdateFailed, UsageError

_RESTART = "A box that is running is still the old one, and can load no further models: restart it"


@click.command()
@standard_options(home=False)
@click.option("--check", "what", flag_value="check", help="Say which release is the newest.")
@click.option("--apply", "what", flag_value="apply", help="Install the newest release.")
@click.option("--rollback", "what", flag_value="rollback", help="Return to the version before.")
def update(call: Call, what: str | None) -> None:
    """Update this executable from the page of releases.

    Nothing is fetched unless one of these options is given.  PINAIVU_RELEASES names another page
    than the project's.  A release is installed only if its signature and digest are right and it
    starts; the executable before it stays beside the new one, as NAME.previous.

    If a new version does not even start, 'NAME.previous update --rollback' returns to the one
    before.

    --rollback does not change the home.  If the newer version has migrated the database, the older
    one refuses it: restore the backup that was made before the migration ('pinaivu restore').
    """
    if what is None:
        raise UsageError("Choose one: --check, --apply or --rollback.")
    {"check": _check, "apply": _apply, "rollback": _roll_back}[what](call)


def _check(call: Call) -> None:
    release = _newest(_variant())
    newer = _is_newer(release.version)
    facts = {"current": __version__, "newest": release.version, "newer": newer, "url": release.url}
    call.print(facts, _print_check)


def _print_check(facts: dict[str, Any]) -> None:
    if not facts["newer"]:
        click.echo(f"{facts['current']} is the newest version ({facts['newest']} is released).")
        return
    click.echo(f"{facts['newest']} is released; this is {facts['current']}.")
    click.echo("Install it with 'pinaivu update --apply'.")


def _apply(call: Call) -> None:
    from pinaivu_box.release.place import releases_url
    from pinaivu_box.update import executable, newest

    own = executable.own()
    if executable.current(own) != own:
        raise UpdateFailed(
            f"This is the version before an update: run '{own} update --rollback' first, or update "
            f"{executable.current(own)}."
        )
    release = _newest(executable.variant(own))
    if not _is_newer(release.version):
        if release.version != __version__:
            raise UpdateFailed(
                f"The newest release is {release.version}, older than this ({__version__}): "
                "nothing was changed ('pinaivu update --rollback' returns to the version before)."
            )
        call.print(_facts(own, __version__), lambda _: click.echo(f"{__version__} is the newest."))
        return
    click.echo(f"Downloading {release.name}", err=True)
    executable.replace(
        own, release.version, lambda out: newest.download(releases_url(), release, out)
    )
    call.print(_facts(own, release.version), _print_change)


def _roll_back(call: Call) -> None:
    from pinaivu_box.update import executable

    own = executable.current(executable.own())
    version = executable.roll_back(own)
    call.print(_facts(own, version), _print_change)


def _facts(own: Path, version: str) -> dict[str, Any]:
    from pinaivu_box.update import executable

    return {
        "executable": str(own),
        "version": version,
        "previous": str(executable.previous(own)),
        "previous_version": __version__,
        "restart": _restarts(own),
    }


def _restarts(own: Path) -> list[str]:
    """The commands that restart the services which run this executable."""
    from pinaivu_box.systemd import manager

    as_root = () if os.geteuid() == 0 else ("sudo",)
    return [
        shlex.join(
            (
                *(as_root if service.system else ()),
                *manager.systemctl_command(service.system, "restart", service.name),
            )
        )
        for service in manager.all_installed()
        if os.path.realpath(service.executable) == os.path.realpath(own)
    ]


def _print_change(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['executable']} is {facts['version']} now.")
    click.echo(f"{facts['previous_version']} is {facts['previous']}.")
    if not facts["restart"]:
        click.echo(f"{_RESTART}.")
        return
    click.echo(f"{_RESTART}:\n")
    for command in facts["restart"]:
        click.echo(f"    {command}")


def _newest(variant: str) -> Any:
    """Raises UpdateFailed, ReleaseNotVerified."""
    from pinaivu_box.release import sums
    from pinaivu_box.release.place import releases_url
    from pinaivu_box.update import newest

    releases = releases_url()
    if (key := sums.public_key()) is None:
        raise UpdateFailed(
            "This program was built without a release key, so it cannot verify releases: see "
            f"{releases}."
        )
    return newest.newest(releases, variant, key)


def _variant() -> str:
    """That of this executable; "" in a clone, where only the version matters."""
    from pinaivu_box.update import executable

    try:
        return executable.variant(executable.own())
    except UpdateFailed:
        return ""


def _is_newer(version: str) -> bool:
    from pinaivu_box.update.versions import is_older

    return is_older(__version__, version)
