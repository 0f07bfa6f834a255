"""What is put into the executable: its components with versions and licences.

Called by pinaivu.spec.  A file that nobody knows the licence of ends the build, and so does one
under the GPL without an exception, which may not be part of an Apache-2.0 executable.
"""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from llama import compiler
from msgspec.structs import replace

from pinaivu_box.release import installed
from pinaivu_box.release.licenses import Component, LicenseText

ROOT = Path(__file__).parent.parent
LICENSES = Path(__file__).parent / "licenses"  # of what brings none in its package
# llama-cpp-python's version, and llama.cpp's commit in it, which its changelog names.
LLAMA_COMMIT = ("0.3.36", "0c1e57098")
GCC = "GPL-3.0-or-later WITH GCC-exception-3.1"
# The system's libraries that Python and llama.cpp need: how their names begin -> what they are.
LIBRARIES = {
    "libc.": ("glibc", "LGPL-2.1-or-later"),
    "libbz2.": ("bzip2", "bzip2-1.0.6"),
    "libcrypto.": ("OpenSSL", "Apache-2.0"),
    "libexpat.": ("Expat", "MIT"),
    "libffi.": ("libffi", "MIT"),
    "libgcc_s.": ("libgcc", GCC),
    "libgomp.": ("libgomp", GCC),
    "liblzma.": ("liblzma", "LicenseRef-Public-Domain OR 0BSD"),  # before 5.6, and since
    "libmpdec.": ("mpdecimal", "BSD-2-Clause"),
    "libsqlite3.": ("SQLite", "blessing"),
    "libssl.": ("OpenSSL", "Apache-2.0"),
    "libstdc++.": ("libstdc++", GCC),
    "libuuid.": ("libuuid", "BSD-3-Clause"),
    "libz.": ("zlib", "Zlib"),
}
WORD = re.compile(r"[()]|[^\s()]+")


class Unknown(Exception):
    """The build ends: its message says what to do."""


def of_files(paths: Iterable[Path]) -> list[Component]:
    """The components that these files belong to, with the default model."""
    owners = _owners()
    found = {one.name: one for one in (installed.program(), installed.python(), installed.model())}
    for path in sorted(set(paths)):
        real = path.resolve()
        if real in owners:
            name = owners[real].metadata["Name"]
            if name not in found:
                found[name] = of_package(owners[real])
        elif not _is_known(real):
            library = system_library(path)
            found.setdefault(library.name, library)
    if "llama_cpp_python" in found or "llama-cpp-python" in found:
        found["llama.cpp"] = llama_cpp()
    found["PyInstaller"] = loader()
    found |= {one.name: one for one in launcher()}
    return check(list(found.values()))


def check(found: list[Component]) -> list[Component]:
    """Raises Unknown if one has no licence, or one that may not be inside."""
    for one in found:
        if not one.license:
            raise Unknown(f"{one.name} names no licence: read it, and add it to the build")
        for name, license in [(one.name, one.license), *((p.name, p.license) for p in one.parts)]:
            if license and not allowed(license):
                raise Unknown(f"{name} is under {license}: leave it out of the executable")
    return found


def allowed(expression: str) -> bool:
    """Whether an SPDX expression can be met without the GPL, unless that has an exception."""
    words = WORD.findall(expression)[::-1]

    def alternatives() -> bool:
        found = every()
        while words and words[-1] == "OR":
            words.pop()
            found |= every()
        return found

    def every() -> bool:
        found = one()
        while words and words[-1] == "AND":
            words.pop()
            found &= one()
        return found

    def one() -> bool:
        word = words.pop()
        if word == "(":
            found = alternatives()
            words.pop()
            return found
        if words and words[-1] == "WITH":
            del words[-2:]
            return True
        return not word.startswith(("GPL-", "AGPL-"))

    return alternatives()


def of_package(package: Distribution) -> Component:
    """A package; its licence's text is in build/licenses if it brings none."""
    made = installed.of_distribution(package)
    path = LICENSES / f"{made.name}.txt"
    if made.texts or not path.is_file():
        return made
    return replace(made, texts=(LicenseText("LICENSE", path.read_text()),))


def system_library(path: Path) -> Component:
    """One of the system's libraries.  Its version and licence are its Debian package's, or else the
    version is what its name says."""
    known = [about for prefix, about in LIBRARIES.items() if path.name.startswith(prefix)]
    if not known:
        raise Unknown(f"{path} has no known licence: add it to build/components.py")
    name, license = known[0]
    package, version = _debian_package(path)
    notices = Path(f"/usr/share/doc/{package}/copyright")
    texts: tuple[LicenseText, ...] = ()
    if package and notices.is_file():
        texts = (LicenseText("copyright", notices.read_text(errors="replace")),)
    named = path.resolve().name.partition(".so.")[2]
    source = f"Debian package {package}" if package else ""
    return Component(name, version or named, "library", license, texts, source)


def llama_cpp() -> Component:
    """llama.cpp with ggml, which llama-cpp-python's wheel is built from."""
    wheel = distribution("llama-cpp-python").version
    if wheel != LLAMA_COMMIT[0]:
        raise Unknown(f"say in build/components.py which commit of llama.cpp is in {wheel}")
    paths = sorted((LICENSES / "llama.cpp").glob("*.txt"))
    texts = tuple(LicenseText(path.name, path.read_text()) for path in paths)
    source = f"in the source of llama-cpp-python {wheel}, with build/llama.patch"
    return Component("llama.cpp", LLAMA_COMMIT[1], "library", "MIT", texts, source)


def loader() -> Component:
    """PyInstaller's loader, which starts the executable."""
    made = installed.of_distribution(distribution("pyinstaller"))
    license = "GPL-2.0-or-later WITH Bootloader-exception"
    return replace(made, name="PyInstaller", kind="program", license=license)


def launcher() -> list[Component]:
    """What the launcher, which begins the executable, is linked with."""
    package = distribution("backports.zstd")
    texts = installed.of_distribution(package).texts
    texts = tuple(text for text in texts if "zstd" in text.name)
    source = f"in the source of backports.zstd {package.version}"
    zstd = Component("Zstandard", "", "library", "BSD-3-Clause OR GPL-2.0-only", texts, source)
    return [zstd, *filter(None, [_static_glibc()])]


def _static_glibc() -> Component | None:
    """None where the launcher is linked with the system's."""
    found = _output(*compiler().split(), "-print-file-name=libc.a").strip()
    if not Path(found).is_absolute():
        return None
    made = system_library(Path(found).resolve())
    return replace(made, source=f"{made.source}, in the launcher".lstrip(", "))


def _owners() -> dict[Path, Distribution]:
    """Each file of each installed package."""
    found: dict[Path, Distribution] = {}
    for package in distributions():
        for path in package.files or ():
            found[Path(str(path.locate())).resolve()] = package
    return found


def _is_known(path: Path) -> bool:
    """Whether it is Python's, ours, or made by PyInstaller of what is."""
    if path.name.startswith("libpython"):
        return True
    site = Path(sysconfig.get_path("purelib")).resolve()
    folders = (ROOT, Path(sysconfig.get_path("stdlib")).resolve())
    return not path.is_relative_to(site) and any(map(path.is_relative_to, folders))


def _debian_package(path: Path) -> tuple[str, str]:
    """Its name and version, two empty texts if there is none."""
    if not shutil.which("dpkg-query"):
        return "", ""
    # The database has files below /lib, which is a link to /usr/lib now.
    names = {str(path), str(path.resolve()), str(path).removeprefix("/usr")}
    names |= {name.removeprefix("/usr") for name in names}
    for name in sorted(names):
        done = _output("dpkg-query", "--search", name)
        if done:
            package = done.partition(": ")[0]
            version = _output("dpkg-query", "--show", "--showformat=${Version}", package)
            return package.partition(":")[0], version
    return "", ""


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
