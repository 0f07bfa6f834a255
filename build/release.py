"""What build/release makes in dist/: executables, wheels, what they consist of, signed sums."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import gpu
import llama
import model_wheel
from common import BUILD, MODEL, ROOT, VENV, Stop, say
from environment import (
    PYTHON,
    cache,
    clean_environment,
    locked,
    need_space,
    run_quietly,
    set_up_release,
)
from progress import step

DIST = ROOT / "dist"
PACKAGE = ROOT / "pinaivu_box"
PUBLIC_KEY = PACKAGE / "release/public_key.pem"
SYSTEMS = {"darwin": "macos"}
EARLIEST = "315532800"  # seconds: 1980, before which a zip file knows no time
SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
USAGE = (
    "--key FILE or --unsigned, --cuda [--arch ARCHITECTURES] [--cublas], --vulkan, --dirty; or"
    " --sign with one of the first two; or --new-key FILE"
)


@dataclass
class ReleaseOptions:
    key: Path | None = None
    unsigned: bool = False
    dirty: bool = False
    variants: list[gpu.BackendChoice] = field(default_factory=list)


def release(arguments: list[str]) -> None:
    """Everything of a release, from a clean tree.  With --new-key a release key; with --sign only
    sums and signature of what is in dist/, such as files that were made on several machines."""
    if arguments[:1] == ["--new-key"]:
        new_key(arguments[1:])
        return
    if arguments[:1] == ["--sign"]:
        sign_again(read_options(arguments[1:]))
        return
    options = read_options(arguments)
    check_tree(options.dirty)
    # A key that cannot be used is found out before anything is built.
    public = public_half(options)
    need_space(ROOT, 3000)
    set_up_release()
    with locked(BUILD):
        files = make_files(options, public)
    write_sums(files)
    sign(options)
    say(f"made dist/{SUMS} and {len(files)} files: {', '.join(path.name for path in files)}")


def read_options(arguments: list[str]) -> ReleaseOptions:
    options, rest = ReleaseOptions(), list(arguments)
    named = os.environ.get("PINAIVU_RELEASE_KEY")
    while rest:
        choice, left = gpu.read_options(rest)
        if choice.kind:
            options.variants.append(choice)
            rest = left
            continue
        option = rest.pop(0)
        if option == "--key" and rest:
            named = rest.pop(0)
        elif option == "--unsigned":
            options.unsigned = True
        elif option == "--dirty":
            options.dirty = True
        else:
            raise Stop(f"build/release does not know {option!r}: it takes {USAGE}")
    if named and not options.unsigned:
        options.key = Path(named).expanduser().absolute()
    if not options.key and not options.unsigned:
        raise Stop(
            "a release is signed: name the release key with --key FILE or PINAIVU_RELEASE_KEY "
            "(build/release --new-key FILE makes one), or say --unsigned"
        )
    return options


def check_tree(dirty: bool) -> None:
    changed = git("status", "--porcelain")
    if changed and not dirty:
        raise Stop(
            "a release is made of a commit, and there are changes that are in none: commit them, "
            "or say --dirty",
            shown=changed.splitlines()[:20],
        )


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Stop("git is needed: install it (Debian, Ubuntu: apt install git)") from error
    if done.returncode:
        raise Stop(f"git {arguments[0]} failed: {done.stderr.strip()[:200]}")
    return done.stdout.strip()


def version() -> str:
    text = (PACKAGE / "__init__.py").read_text()
    return re.findall(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[0]


def releases() -> str:
    """The page of releases, as `release.place` reads it."""
    project = tomllib.loads((BUILD.parent / "pyproject.toml").read_text())["project"]
    return str(project["urls"]["Releases"])


# -- the files ------------------------------------------------------------------------------------


def make_files(options: ReleaseOptions, public: str) -> list[Path]:
    """All that are listed in SHA256SUMS."""
    import tasks

    DIST.mkdir(exist_ok=True)
    work = VENV / "pyinstaller"
    stem = f"pinaivu-{version()}"
    platform = f"{SYSTEMS.get(sys.platform, sys.platform)}-{os.uname().machine}"
    executables = [DIST / f"{stem}-{platform}"]
    frozen = tasks.freeze(work)
    made = [gpu.make(choice) for choice in options.variants]
    tasks.check_glibc(frozen, [one.folder for one in made])
    tasks.put_together(frozen, executables[0], [])
    more = []
    for choice, backend in zip(options.variants, made, strict=True):
        payload = tasks.make_payloads(work, choice, backend)
        executables.append(DIST / f"{stem}-{platform}-{choice.kind}")
        tasks.put_together(frozen, executables[-1], [payload])
        if choice.with_cublas:
            more.append(DIST / "pinaivu-cublas.payload")
    described = describe(work, stem, executables)
    return [*executables, *more, *wheels(), *described, *installer(public)]


def wheels() -> list[Path]:
    """Our own wheel and sdist, llama-cpp-python's wheel for any CPU, and one with the model."""
    work = VENV / "release-dist"
    shutil.rmtree(work, ignore_errors=True)
    with step("making the wheel and the sdist (5 seconds)"):
        build = [str(VENV / "release/bin/hatchling"), "build", "-d", str(work)]
        run_quietly(build, "making the wheel", cwd=ROOT, more=reproducible())
    with step("making a wheel with the default model"):
        model_wheel.make(work, MODEL, ROOT / "LICENSE", version())
    made = llama.wheel(cache())
    for path in [*work.iterdir(), made]:
        shutil.copyfile(path, DIST / path.name)
    return sorted(DIST / path.name for path in [*work.iterdir(), made])


def describe(work: Path, stem: str, executables: list[Path]) -> list[Path]:
    """The bill of materials and the licences, as the executable itself tells them."""
    with step("writing licences and bill of materials"):
        parts = work / "components.json"
        parts.write_text(output(executables[0], "licenses", "--json"))
        texts = DIST / f"{stem}-licenses.txt"
        texts.write_text(output(executables[0], "licenses", "--full"))
        bom = DIST / f"{stem}.cdx.json"
        arguments = [str(parts), str(bom), version(), epoch(), *map(str, executables)]
        script = [str(VENV / "release/bin/python"), str(BUILD / "sbom.py"), *arguments]
        run_quietly(script, "writing the bill of materials")
    return [bom, texts]


def output(executable: Path, *arguments: str) -> str:
    command = [str(executable), *arguments]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{executable.name} {arguments[0]} failed (see above)"
        raise Stop(message, shown=done.stderr.splitlines()[-30:])
    return done.stdout


def installer(public: str) -> list[Path]:
    """install.sh, which knows the release that it comes with."""
    source, target = BUILD / "install.sh", DIST / "install.sh"
    if not source.exists():
        return []
    text = source.read_text()
    about = {"RELEASES": releases(), "PUBLIC_KEY": public.strip(), "VERSION": version()}
    for name, value in about.items():
        if f'\n{name}=""\n' not in text:
            raise Stop(f'build/install.sh has no line {name}="" to be filled in')
        text = text.replace(f'\n{name}=""\n', f'\n{name}="{value}"\n', 1)
    target.write_text(text)
    target.chmod(0o755)
    return [target]


def epoch() -> str:
    """The time of the commit, in seconds since 1970."""
    return git("log", "-1", "--format=%ct")


def reproducible() -> dict[str, str]:
    """The environment in which the same commit makes the same bytes."""
    try:
        moment = epoch()
    except Stop:  # a source archive, which is no clone
        moment = EARLIEST
    return {"SOURCE_DATE_EPOCH": moment, "PYTHONHASHSEED": "0"}


# -- sums and signature ---------------------------------------------------------------------------


def write_sums(files: list[Path]) -> None:
    lines = []
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (DIST / SUMS).write_text("".join(lines))
    (DIST / SIGNATURE).unlink(missing_ok=True)  # that of another release


def sign_again(options: ReleaseOptions) -> None:
    public_half(options)
    files = [path for path in DIST.glob("*") if path.name not in (SUMS, SIGNATURE)]
    if not files:
        raise Stop("there is nothing in dist/ to be signed: build/release without --sign makes it")
    write_sums(files)
    sign(options)
    say(f"made dist/{SUMS} of {len(files)} files")


def sign(options: ReleaseOptions) -> None:
    if options.key is None:
        say("the release is not signed: nobody can verify it, and nothing installs it")
        return
    signing("sign", options.key, DIST / SUMS, DIST / SIGNATURE)
    if not PUBLIC_KEY.exists():
        say(
            "no release key is in the repository (pinaivu_box/release/public_key.pem), so "
            "'pinaivu verify-release' needs --key with the public half of this one"
        )


def public_half(options: ReleaseOptions) -> str:
    """Of the key that signs, or else of the project's (PEM); "" if there is none.  Raises Stop if
    the two differ."""
    if options.key is None:
        return PUBLIC_KEY.read_text() if PUBLIC_KEY.exists() else ""
    public = signing("public", options.key)
    if PUBLIC_KEY.exists() and PUBLIC_KEY.read_text() != public:
        raise Stop(
            f"{options.key} is not the release key, whose public half is in "
            f"{PUBLIC_KEY.relative_to(ROOT)}: nobody's program would accept its signature"
        )
    return public


def new_key(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise Stop("build/release --new-key takes a file, which must not exist yet")
    path = Path(arguments[0]).expanduser().absolute()
    signing("new", path, PUBLIC_KEY)
    say(f"made the release key {path}: keep it where only you can read it, and keep a copy")
    say(f"its public half is in {PUBLIC_KEY.relative_to(ROOT)}: commit it")


def signing(*arguments: str | Path) -> str:
    command = [str(PYTHON), str(BUILD / "signing.py"), *map(str, arguments)]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Stop(done.stderr.strip().splitlines()[-1])
    return done.stdout
