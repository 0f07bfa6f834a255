"""What build/release decides, signs and describes; tests/test_binary.py has the executable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pinaivu_box import __version__
from pinaivu_box.models import bundled
from pinaivu_box.release import sums
from tests.support.build_scripts import BUILD, build_module
from tests.support.in_process_command import run_command
from tests.support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
OPENBLAS = {"name": "openblas", "version": "1", "license": "BSD-3-Clause"}
PARTS: list[dict[str, Any]] = [
    {"name": name, "version": "1.2", "kind": kind, "license": license, "source": "", "parts": parts}
    for name, kind, license, parts in (
        ("numpy", "package", "BSD-3-Clause", [OPENBLAS]),
        ("pinaivu-box", "program", "MIT", []),
        ("zlib", "library", "Zlib", []),
        ("A", "model", "A-1 AND (B-1 OR C)", []),
    )
]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script, which releases into a folder of the test and knows no release key."""
    monkeypatch.delenv("PINAIVU_RELEASE_KEY", raising=False)
    with build_module("release") as module:
        monkeypatch.setattr(module, "DIST", tmp_path / "dist")
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "PUBLIC_KEY", tmp_path / "public_key.pem")
        monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
        (tmp_path / "dist").mkdir()
        yield module


def stop() -> type[Exception]:
    found: type[Exception] = sys.modules["common"].Stop
    return found


def test_a_new_key_signs_what_verify_release_and_openssl_accept(
    release: ModuleType, tmp_path: Path
) -> None:
    release.new_key([str(tmp_path / "key.pem")])
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    options = release.read_options(["--key", str(tmp_path / "key.pem")])
    assert release.public_half(options) == (tmp_path / "public_key.pem").read_text()
    program = tmp_path / "dist" / "pinaivu-1.0.0-linux-x86_64"
    program.write_bytes(b"program")
    release.write_sums([program])
    release.sign(options)
    listed = (tmp_path / "dist" / sums.SUMS).read_text()
    assert listed == f"{hashlib.sha256(b'program').hexdigest()}  {program.name}\n"
    assert len((tmp_path / "dist" / sums.SIGNATURE).read_bytes()) == 64
    key = ["--key", str(tmp_path / "public_key.pem")]
    assert run_command("verify-release", str(program), *key, home=None).returncode == 0


def test_no_key_is_overwritten(release: ModuleType, tmp_path: Path) -> None:
    release.new_key([str(tmp_path / "key.pem")])
    before = (tmp_path / "key.pem").read_bytes()
    for name in ("key.pem", "other.pem"):  # the public half of the second is there already
        with pytest.raises(stop(), match="is there already"):
            release.new_key([str(tmp_path / name)])
    assert (tmp_path / "key.pem").read_bytes() == before and not (tmp_path / "other.pem").exists()


def test_keys_that_cannot_sign_are_found_out_before_anything_is_built(
    release: ModuleType, tmp_path: Path
) -> None:
    release.new_key([str(tmp_path / "key.pem")])
    (tmp_path / "text.pem").write_text("no key")
    (tmp_path / "text.pem").chmod(0o600)
    (tmp_path / "open.pem").write_bytes((tmp_path / "key.pem").read_bytes())
    (tmp_path / "open.pem").chmod(0o640)
    for name, why in (
        ("absent.pem", "cannot be read: No such file"),
        ("text.pem", "no private key in PEM form"),
        ("public_key.pem", "others can read the release key"),
        ("open.pem", r"its mode is 640\): run 'chmod 600 "),
    ):
        with pytest.raises(stop(), match=why):
            release.public_half(release.read_options(["--key", str(tmp_path / name)]))
    (tmp_path / "public_key.pem").unlink()
    release.new_key([str(tmp_path / "second.pem")])
    with pytest.raises(stop(), match="is not the release key"):
        release.public_half(release.read_options(["--key", str(tmp_path / "key.pem")]))


def test_a_release_is_unsigned_only_if_that_is_said(
    release: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(stop(), match="or say --unsigned"):
        release.read_options([])
    assert release.read_options(["--unsigned"]).key is None
    monkeypatch.setenv("PINAIVU_RELEASE_KEY", "/keys/release.pem")
    assert release.read_options(["--vulkan"]).key == Path("/keys/release.pem")
    assert release.read_options(["--unsigned"]).key is None
    options = release.read_options(["--cuda", "--arch", "86", "--vulkan", "--key", "/k", "--dirty"])
    assert [one.kind for one in options.variants] == ["cuda", "vulkan"] and options.dirty
    for wrong in (["--signed"], ["--key"], ["now"]):
        with pytest.raises(stop(), match="does not know"):
            release.read_options(wrong)


def test_a_release_is_of_a_commit(release: ModuleType, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / ".gitignore").write_text("dist/\n")
    git("add", ".gitignore")
    moment = {"GIT_COMMITTER_DATE": "2026-11-01T12:00:00Z"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*moment.popitem())
        git("commit", "--quiet", "--message", "one")
    release.check_tree(dirty=False)
    assert release.reproducible()["SOURCE_DATE_EPOCH"] == "1793534400"
    (tmp_path / "changed").touch()
    with pytest.raises(stop(), match="changes that are in none"):
        release.check_tree(dirty=False)
    release.check_tree(dirty=True)


def test_without_git_the_time_is_one_that_files_can_have(
    release: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert release.reproducible()["SOURCE_DATE_EPOCH"] == release.EARLIEST
    with pytest.raises(stop(), match="git is needed"):
        release.check_tree(dirty=False)


def test_the_installer_knows_its_release(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tmp_path / "build"
    build.mkdir()
    monkeypatch.setattr(release, "BUILD", build)
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nReleases = "https://example.org/r"\n')
    assert release.installer("") == []
    blank = '#!/bin/sh\nRELEASES=""\nPUBLIC_KEY=""\nVERSION=""\necho "$RELEASES $VERSION"\n'
    (build / "install.sh").write_text(blank)
    (made,) = release.installer("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n")
    assert 'PUBLIC_KEY="-----BEGIN PUBLIC KEY-----\nx\n-----END' in made.read_text()
    ran = subprocess.run([made], capture_output=True, text=True, check=True)
    assert ran.stdout == f"https://example.org/r {__version__}\n"
    (build / "install.sh").write_text("#!/bin/sh\n")
    with pytest.raises(stop(), match='no line RELEASES=""'):
        release.installer("")


def test_the_model_s_wheel_puts_it_where_the_package_looks(tmp_path: Path) -> None:
    (tmp_path / bundled.FILE_NAME).write_bytes(b"GGUF")
    with build_module("model_wheel") as script:
        model = tmp_path / bundled.FILE_NAME
        wheel: Path = script.make(tmp_path, model, ROOT / "LICENSE", "1.0.0")
        first = wheel.read_bytes()
        assert script.make(tmp_path, model, ROOT / "LICENSE", "1.0.0").read_bytes() == first
    options = ["--no-index", "--no-deps", "--prefix", str(tmp_path / "prefix"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    assert (tmp_path / "prefix/share/pinaivu/models" / bundled.FILE_NAME).read_bytes() == b"GGUF"


# -- the bill of materials -------------------------------------------------------------------------


def test_the_bill_of_materials_is_the_same_for_the_same_contents(tmp_path: Path) -> None:
    program = tmp_path / "pinaivu-1.0.0-linux-x86_64"
    program.write_bytes(b"program")
    with build_module("sbom") as sbom:
        made = sbom.document(PARTS, "1.0.0", 1793534400, [program])
        assert made == sbom.document(PARTS[::-1], "1.0.0", 1793534400, [program])
    about = made["metadata"]["component"]
    assert made["specVersion"] == "1.6" and about["name"] == "pinaivu-box"
    assert made["metadata"]["timestamp"] == "2026-11-01T12:00:00Z"
    (file,) = about["components"]
    assert file["hashes"][0]["content"] == hashlib.sha256(b"program").hexdigest()
    by_name = {one["name"]: one for one in made["components"]}
    assert sorted(by_name) == ["A", "numpy", "zlib"]
    assert by_name["numpy"]["purl"] == "pkg:pypi/numpy@1.2"
    assert by_name["numpy"]["components"][0]["name"] == "openblas"
    assert by_name["A"]["type"] == "machine-learning-model"
    assert by_name["A"]["licenses"] == [{"expression": "A-1 AND (B-1 OR C)"}]
    references = [one["bom-ref"] for one in made["components"]]
    assert sorted(references) == made["dependencies"][0]["dependsOn"]
    assert made["dependencies"][0]["ref"] == about["bom-ref"]


@pytest.mark.skipif(
    not (ROOT / ".venv/release/bin/python").exists(), reason="no release was made in this clone"
)
def test_the_bill_of_materials_is_valid_by_cyclonedx_own_schema(tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text(json.dumps(PARTS))
    command = [ROOT / ".venv/release/bin/python", BUILD / "sbom.py", tmp_path / "parts.json"]
    subprocess.run([*command, tmp_path / "bom.json", "1.0.0", "1793534400"], check=True)
    assert json.loads((tmp_path / "bom.json").read_text())["components"]


# -- licences --------------------------------------------------------------------------------------


def test_an_unknown_licence_and_the_gpl_end_the_build() -> None:
    from pinaivu_box.release.licenses import Component

    with build_module("components") as parts:
        for license, refused in {
            "MIT": False,
            "LGPL-2.1-or-later": False,
            "GPL-3.0-or-later WITH GCC-exception-3.1": False,
            "GPL-2.0-or-later WITH Bootloader-exception": False,
            "GPL-3.0-or-later": True,
            "AGPL-3.0-only": True,
            "MIT AND GPL-2.0-only": True,
            "Apache-2.0 OR GPL-2.0-only": False,
            "GPL-2.0-only AND (MIT OR Apache-2.0)": True,
            "(MIT OR GPL-2.0-only) AND Unicode-3.0": False,
            "": True,
        }.items():
            found = [Component("x", "1", "package", license)]
            if refused:
                with pytest.raises(parts.Unknown, match="x"):
                    parts.check(found)
            else:
                assert parts.check(found) == found
        with pytest.raises(parts.Unknown, match="no known licence"):
            parts.system_library(Path("/usr/lib/libreadline.so.8"))
        assert parts.system_library(Path("/usr/lib/libssl.so.3")).license == "Apache-2.0"


def test_what_is_packed_is_read_again_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pinaivu_box.release import licenses

    found = [
        licenses.Component("b", "1", "package", "MIT", (licenses.LicenseText("LICENSE", "Ü\n"),)),
        licenses.Component("a", "1", "program", "MIT"),
    ]
    packed = licenses.pack(found)
    assert packed == licenses.pack(found[::-1])
    (tmp_path / "packed").write_bytes(packed)
    monkeypatch.setattr(licenses, "_PACKED", tmp_path / "packed")
    assert licenses.components() == found[::-1]
    shown = run_command("licenses", "--full", home=None).stdout
    assert "b 1: MIT" in shown and "--- LICENSE\n\nÜ\n" in shown


def test_a_clone_says_what_its_packages_say() -> None:
    listed = json.loads(run_command("licenses", "--json", home=None).stdout)
    found = {one["name"].lower(): one for one in listed}
    for name, kind, license in (
        ("pinaivu-box", "program", "Apache-2.0"),
        ("python", "program", "PSF-2.0"),
        ("starlette", "package", "BSD-3-Clause"),
        ("smollm2-135m-instruct", "model", "Apache-2.0"),
        ("zeroconf", "package", "LGPL-2.1-or-later"),
    ):
        assert (found[name]["kind"], found[name]["license"]) == (kind, license)
    # A package that another one needs; and nothing that only tests need.
    assert "h11" in found and not {"pytest", "mypy", "pyinstaller"} & set(found)
    assert [one["name"] for one in listed if not one["license"]] == []
    full = json.loads(run_command("licenses", "--json", "--full", home=None).stdout)
    texts = {one["name"].lower(): one["texts"] for one in full}
    assert "Apache License" in texts["pinaivu-box"][0]["text"]
    table = run_command("licenses", home=None, env={"COLUMNS": "80"}).stdout
    assert table.splitlines()[0].split() == ["NAME", "VERSION", "KIND", "LICENSE"]


# -- workflows -------------------------------------------------------------------------------------


def test_the_key_file_of_the_environment_is_not_committed() -> None:
    """No private key is in the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if not names:
        pytest.skip("this is no clone")
    mark = b"-----BEGIN " + b"PRIVATE KEY-----"
    keys = [name for name in names if mark in (ROOT / name).read_bytes()[:10_000]]
    assert [name for name in keys if not name.startswith("tests/")] == []


def test_the_scripts_are_executable() -> None:
    for name in ("binary", "release", "wheel"):
        assert os.access(BUILD / name, os.X_OK)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_valid_and_calls_what_there_is(path: Path) -> None:
    made = yaml.safe_load(path.read_text())
    assert made["permissions"] == {"contents": "read"}
    for job in made["jobs"].values():
        assert job["timeout-minutes"] and (job["runs-on"] or job["strategy"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for script in re.findall(r"build/[a-z]+", step.get("run", "")):
                assert os.access(ROOT / script, os.X_OK)


def test_platforms_that_were_never_tried_are_marked_and_stop_nothing() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    build = yaml.safe_load(text)["jobs"]["build"]
    platforms = [one["platform"] for one in build["strategy"]["matrix"]["include"]]
    assert platforms == ["linux-x86_64", "linux-aarch64", "macos-arm64"]
    assert "!= 'linux-x86_64'" in build["continue-on-error"]
    for platform in platforms[1:]:
        before = text.partition(f"platform: {platform}")[0].splitlines()
        assert "# Never run: " in before[-3] + before[-2]
