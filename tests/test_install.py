"""build/install.sh against a page of releases that lies: what is not verified is never installed,
and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.release_server import (
    Answer,
    ReleaseServer,
    content,
    cut_off,
    endless,
    fake_executable,
    name_of,
    redirect,
    release_server,
    status,
    sums_line,
)

SCRIPT = ROOT / "build/install.sh"
TOOLS = [
    "awk",
    "cat",
    "chmod",
    "cp",
    "cut",
    "env",
    "grep",
    "head",
    "ln",
    "ls",
    "mkdir",
    "mktemp",
    "mv",
    "printf",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "tail",
    "tr",
    "uname",
    "wc",
]
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("curl", "openssl"))), reason="curl and openssl are not installed"
)


class Installation:
    """A home in which the script runs, with only the named programs in PATH."""

    def __init__(self, folder: Path, server: ReleaseServer, *programs: str) -> None:
        self.folder = folder / ".local/bin"
        self._home = folder
        self._server = server
        self.path = folder / "path"
        self.path.mkdir(parents=True)
        for name in (*TOOLS, *programs):
            (self.path / name).symlink_to(str(shutil.which(name)))
        self.filled = {
            "RELEASES": server.url,
            "PUBLIC_KEY": server.public_key.decode().strip(),
            "VERSION": "",
        }
        self.script = SCRIPT.read_text().replace("MAX_EXECUTABLE_MB=4096", "MAX_EXECUTABLE_MB=4")

    def run(
        self, *arguments: str, shell: str = "sh", **env: str
    ) -> subprocess.CompletedProcess[str]:
        script = self.script
        for name, value in self.filled.items():
            assert f'\n{name}=""\n' in script
            script = script.replace(f'\n{name}=""\n', f'\n{name}="{value}"\n')
        return subprocess.run(
            [
                *str(shutil.which(shell.split()[0])).split(),
                *shell.split()[1:],
                "-s",
                "--",
                *arguments,
            ],
            input=script,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self._home,
            env={"HOME": str(self._home), "PATH": str(self.path), **env},
        )

    @property
    def installed(self) -> bytes | None:
        path = self.folder / "pinaivu"
        return path.read_bytes() if path.exists() else None

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReleaseServer]:
    (tmp_path / "server").mkdir()
    with release_server(tmp_path / "server") as started:
        started.release("0.2.0", "cuda", "vulkan")
        yield started


@pytest.fixture
def here(tmp_path: Path, server: ReleaseServer) -> Installation:
    return Installation(tmp_path / "home", server, "curl", "openssl")


@pytest.mark.parametrize("shell", ["dash", "bash --posix", "busybox sh"])
@pytest.mark.parametrize("client", ["curl", "wget"])
def test_it_installs_what_was_released(
    tmp_path: Path, server: ReleaseServer, shell: str, client: str
) -> None:
    if not shutil.which(shell.split()[0]) or not shutil.which(client):
        pytest.skip(f"{shell} or {client} is not installed")
    here = Installation(tmp_path / "home", server, client, "openssl")
    done = here.run("--variant", "cpu", shell=shell)
    assert done.returncode == 0, done.stderr
    assert here.installed == fake_executable("0.2.0")
    assert os.access(here.folder / "pinaivu", os.X_OK)
    assert here.left() == ["pinaivu"]
    for part in (
        f"Installed Pinaivu Box 0.2.0 as {here.folder}/pinaivu.",
        f"{here.folder} is not in PATH",
        f"{here.folder}/pinaivu serve",
        f"rm {here.folder}/pinaivu",
    ):
        assert part in done.stdout


def test_it_says_no_more_of_path_than_there_is_to_say(here: Installation) -> None:
    done = here.run("--variant", "cpu", PATH=f"{here.path}:{here.folder}")
    assert "PATH" not in done.stdout and "Start it:  pinaivu serve" in done.stdout


def test_what_is_there_is_kept_as_the_previous_one(
    here: Installation, server: ReleaseServer
) -> None:
    here.run("--variant", "cpu")
    server.release("0.10.0")
    done = here.run("--variant", "cpu")
    assert here.installed == fake_executable("0.10.0"), done.stderr
    assert here.left() == ["pinaivu", "pinaivu.previous"]
    assert (here.folder / "pinaivu.previous").read_bytes() == fake_executable("0.2.0")
    assert "goes on with it until it is restarted" in done.stdout
    assert here.run("--uninstall").returncode == 0
    assert here.left() == []


def test_it_goes_where_it_is_told(here: Installation, tmp_path: Path) -> None:
    assert here.run("--variant", "cpu", "--to", "some where").returncode == 0
    assert (tmp_path / "home/some where/pinaivu").exists()
    assert here.run("--variant", "cpu", PINAIVU_BIN=str(tmp_path / "bin")).returncode == 0
    assert (tmp_path / "bin/pinaivu").exists()


def test_a_gpu_decides_on_the_variant_unless_somebody_does(here: Installation) -> None:
    (here.path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (here.path / "nvidia-smi").chmod(0o755)
    done = here.run()
    assert here.installed == fake_executable("0.2.0", "cuda"), done.stderr
    assert "NVIDIA" in done.stdout
    here.run("--variant", "vulkan")
    assert here.installed == fake_executable("0.2.0", "vulkan")


@pytest.mark.parametrize(
    ("file", "answer", "sentence"),
    [
        (
            name_of("0.2.0"),
            content(fake_executable("0.2.0") + b"#"),
            "not the file that was released",
        ),
        (name_of("0.2.0"), cut_off(fake_executable("0.2.0")), "cannot be downloaded"),
        (name_of("0.2.0"), content(b"<!DOCTYPE html><p>Sign in"), "not the file that was released"),
        (name_of("0.2.0"), status(404), "cannot be downloaded"),
        (name_of("0.2.0"), endless, "longer than it can be (4194304 bytes)"),
        ("SHA256SUMS", endless, "longer than it can be (65536 bytes)"),
        ("SHA256SUMS", status(503), "cannot be downloaded"),
        ("SHA256SUMS", content(b"<!DOCTYPE html><p>Sign in"), "does not answer with a release"),
        ("SHA256SUMS", content(b""), "does not answer with a release"),
        ("SHA256SUMS.sig", content(b"x" * 64), "is not of the release key"),
        ("SHA256SUMS.sig", content(b""), "is not of the release key"),
        ("SHA256SUMS.sig", endless, "longer than it can be (64 bytes)"),
        ("SHA256SUMS.sig", status(404), "cannot be downloaded"),
        (
            "SHA256SUMS",
            content(sums_line(name_of("0.2.0"), b"evil").encode()),
            "is not of the release key",
        ),
        (
            "SHA256SUMS",
            content((sums_line(name_of("0.2.0"), b"") + sums_line(name_of("0.3.0"), b"")).encode()),
            "more than one version",
        ),
    ],
)
@pytest.mark.parametrize("client", ["curl", "wget"])
def test_what_is_not_as_it_was_released_is_not_installed(
    tmp_path: Path, server: ReleaseServer, client: str, file: str, answer: Answer, sentence: str
) -> None:
    if not shutil.which(client):
        pytest.skip(f"{client} is not installed")
    here = Installation(tmp_path / "home", server, client, "openssl")
    here.folder.mkdir(parents=True)
    (here.folder / "pinaivu").write_bytes(fake_executable("0.1.0"))
    (here.folder / "pinaivu").chmod(0o755)
    server.instead[file] = answer
    done = here.run("--variant", "cpu")
    assert done.returncode == 1
    assert sentence in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert here.installed == fake_executable("0.1.0")
    assert here.left() == ["pinaivu"]


def test_redirects_are_followed(here: Installation, server: ReleaseServer) -> None:
    other = server.url.replace("/releases", "/releases/download/v0.2.0")
    server.instead["SHA256SUMS"] = lambda request: redirect(f"{other}/%53HA256SUMS")(request)
    server.instead["%53HA256SUMS"] = content(
        b"".join(sums_line(name_of("0.2.0", v), fake_executable("0.2.0", v)).encode()
                 for v in ("", "cuda", "vulkan"))
    )  # fmt: skip
    done = here.run("--variant", "cpu")
    assert here.installed == fake_executable("0.2.0"), done.stderr


def test_who_asked_for_https_is_not_led_away_from_it(here: Installation) -> None:
    """curl is told so, which sees redirects before anybody else does."""
    (here.path / "curl").unlink()
    (here.path / "curl").write_text('#!/bin/sh\necho "$@" >>"$HOME/asked"\nexit 6\n')
    (here.path / "curl").chmod(0o755)
    here.run("--variant", "cpu", PINAIVU_RELEASES="https://releases.example")
    asked = (here.folder.parent.parent / "asked").read_text()
    assert "--proto-redir =https " in asked and asked.rstrip().endswith(
        "-- https://releases.example/latest/download/SHA256SUMS"
    )


def test_an_older_release_is_not_installed_although_it_is_signed(
    here: Installation, server: ReleaseServer
) -> None:
    """Whoever can only repeat what was signed once must not bring its mistakes back."""
    server.release("0.10.0")
    here.run("--variant", "cpu")
    server.release("0.9.0")
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "newer than the newest release" in done.stderr
    assert here.installed == fake_executable("0.10.0")
    here.run("--uninstall")
    here.filled["VERSION"] = "0.10.0-rc.1"
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "older than this script (0.10.0-rc.1)" in done.stderr
    assert here.left() == []


def test_the_file_of_another_version_is_not_installed(
    here: Installation, server: ReleaseServer
) -> None:
    server.release("0.3.0", content=fake_executable("0.2.0"))
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "says that it is 'pinaivu, version 0.2.0'" in done.stderr
    assert here.left() == []


def test_what_does_not_run_here_is_not_installed(here: Installation, server: ReleaseServer) -> None:
    server.release("0.3.0", content=b"#!/bin/sh\necho 'pinaivu: this is not enough' >&2; exit 1\n")
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "does not run on this system: pinaivu: this is" in done.stderr
    assert here.left() == []


def test_without_openssl_a_digest_from_elsewhere_is_needed(
    tmp_path: Path, server: ReleaseServer
) -> None:
    here = Installation(tmp_path / "home", server, "curl")
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "OpenSSL 3" in done.stderr and "--sha256" in done.stderr
    old = "#!/bin/sh\n[ $1 = version ] && echo 'OpenSSL 1.1.1w  11 Sep 2023' || echo -verify >&2\n"
    (here.path / "openssl").write_text(old)
    (here.path / "openssl").chmod(0o755)
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "this system has OpenSSL 1.1.1w (" in done.stderr
    wrong = here.run("--variant", "cpu", "--sha256", "0" * 64)
    assert wrong.returncode == 1 and "another SHA-256" in wrong.stderr
    assert here.run("--variant", "cpu", "--sha256", "0" * 63).returncode == 1
    digest = hashlib.sha256(fake_executable("0.2.0")).hexdigest()
    done = here.run("--variant", "cpu", "--sha256", digest)
    assert here.installed == fake_executable("0.2.0"), done.stderr


def test_a_script_without_a_key_installs_nothing(here: Installation, server: ReleaseServer) -> None:
    here.filled["PUBLIC_KEY"] = ""
    done = here.run("--variant", "cpu")
    assert done.returncode == 1 and "no release key" in done.stderr
    here.filled |= {"PUBLIC_KEY": "x", "RELEASES": ""}
    assert "not part of a release" in here.run("--variant", "cpu").stderr
    assert server.asked == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_script_that_was_cut_off_does_nothing(here: Installation, share: float) -> None:
    here.script = here.script[: int(len(here.script) * share)]
    here.filled = {
        name: value for name, value in here.filled.items() if f'\n{name}=""\n' in here.script
    }
    here.run("--variant", "cpu")
    assert not here.folder.exists()


def test_what_it_is_asked_for_and_does_not_know_is_one_sentence(here: Installation) -> None:
    for arguments, sentence in [
        (["--prefix"], "'--prefix' is not known"),
        (["--to"], "--to needs a value"),
        (["--variant", "rocm"], "--variant is cpu, cuda or vulkan"),
        (["--uninstall"], "there is no"),
    ]:
        done = here.run(*arguments)
        assert done.returncode == 1 and sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert here.run("--help").stdout.startswith("Usage: install.sh")


def test_a_folder_that_cannot_be_written_is_one_sentence(
    here: Installation, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = here.run("--variant", "cpu", "--to", str(tmp_path / "file"))
    assert done.returncode == 1 and "name another folder with --to" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
