"""The components of a program that runs from installed packages: what these say of themselves."""

from __future__ import annotations

import platform
import re
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import msgspec

from pinaivu_box import __version__
from pinaivu_box.models import bundled
from pinaivu_box.release.licenses import Component, ComponentPart, LicenseText
from pinaivu_box.release.place import PROJECT, PYPROJECT

_APACHE = Path(bundled.__file__).parent / "license_texts" / "apache-2.0.txt"
_LICENSE_FILE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|COPYRIGHT)", re.IGNORECASE)
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")
# Those whose metadata name no licence; their licence files do.
_KNOWN = {"iroh": "Apache-2.0 OR MIT"}
# What packages wrote before there were SPDX expressions, without "License :: OSI Approved :: ".
_SPDX = {
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The MIT License (MIT)": "MIT",
}
_EXPRESSION = re.compile(r"[A-Za-z0-9.+()-]+( (AND|OR|WITH) [A-Za-z0-9.+()-]+)*")


def installed() -> list[Component]:
    """This program, Python, the packages that it needs, and the default model if it is there."""
    found = [program(), python(), *map(of_distribution, _needed())]
    return [*found, *([model()] if bundled.find() else [])]


def program() -> Component:
    return Component(PROJECT, __version__, "program", "Apache-2.0", (_text(_APACHE, "LICENSE"),))


def python() -> Component:
    path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    texts = (_text(path),) if path.is_file() else ()
    return Component("Python", platform.python_version(), "program", "PSF-2.0", texts)


def model() -> Component:
    """The default model, in the file that the build makes of SmolLM2's."""
    texts = (_text(_APACHE, "LICENSE"),)
    return Component("SmolLM2-135M-Instruct", "Q8_0", "model", "Apache-2.0", texts)


def of_distribution(package: Distribution) -> Component:
    """A package of Python, with its licences and notices, and the Rust libraries in it."""
    texts: list[LicenseText] = []
    parts: list[ComponentPart] = []
    for path in package.files or ():
        if not path.parts[0].endswith(".dist-info"):
            continue
        file = Path(str(path.locate()))
        if "licenses" in path.parts[:-1] or _LICENSE_FILE.match(path.name):
            texts.append(_text(file, "/".join(path.parts[1:])))
        elif path.parts[1:2] == ("sboms",) and path.name.endswith(".cyclonedx.json"):
            parts += _linked(file)
    name, license = package.metadata["Name"], license_of(package)
    return Component(name, package.version, "package", license, tuple(texts), parts=tuple(parts))


def license_of(package: Distribution) -> str:
    """The SPDX expression for what a package says of its licence, "" if it says nothing."""
    about = package.metadata
    if about["Name"] in _KNOWN:
        return _KNOWN[about["Name"]]
    if "License-Expression" in about:
        return about["License-Expression"]
    prefix = "License :: OSI Approved :: "
    for said in [*(about.get_all("Classifier") or ()), *(about.get_all("License") or ())]:
        name = str(said).strip().removeprefix(prefix)
        if name in _SPDX:
            return _SPDX[name]
        if str(said).startswith(prefix) or (name == str(said) and _EXPRESSION.fullmatch(name)):
            return name
    return ""


def _needed() -> Iterator[Distribution]:
    """The packages that this program needs, and those that they need, as far as they are here."""
    names, seen = list(_requirements()), {PROJECT}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # one for another platform, or another Python
            continue
        names += _names(package.requires or ())
        yield package


def _requirements() -> list[str]:
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        return _names(project["dependencies"])
    return _names(distribution(PROJECT).requires or ())


def _names(requirements: list[str] | tuple[str, ...]) -> list[str]:
    named = (_REQUIREMENT.match(one) for one in requirements if "extra ==" not in one)
    return [found[0] for found in named if found]


def _linked(bill: Path) -> list[ComponentPart]:
    """The libraries in a package's own bill of materials (PEP 770), as Maturin writes it."""
    found = []
    for one in msgspec.json.decode(bill.read_bytes()).get("components", ()):
        said = [each.get("expression", "") for each in one.get("licenses", ())]
        found.append(
            ComponentPart(one["name"], one.get("version", ""), " AND ".join(filter(None, said)))
        )
    return sorted(found, key=lambda part: (part.name, part.version))


def _text(path: Path, name: str = "") -> LicenseText:
    return LicenseText(name or path.name, path.read_text(encoding="utf-8", errors="replace"))
