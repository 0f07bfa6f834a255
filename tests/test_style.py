"""What the style sheets and templates of all pages have to keep: contrast, colours of both themes,
and nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SERVER = Path(__file__).parent.parent / "pinaivu_box" / "server"
STYLE = (SERVER / "static" / "style.css").read_text()
SHEETS = sorted((SERVER / "static").rglob("*.css"))
SCRIPTS = sorted((SERVER / "static").rglob("*.js"))
TEMPLATES = sorted((SERVER / "templates").rglob("*.html"))

# What is written upon what.
TEXTS = {
    "text": ("ground", "surface", "sunken", "warn-soft", "bad-soft", "ok-soft"),
    "muted": ("ground", "surface", "sunken"),
    "accent": ("ground", "surface"),
    "accent-strong": ("accent-soft", "surface"),
    "ok": ("surface", "ok-soft"),
    "warn": ("surface", "warn-soft"),
    "bad": ("surface", "ground", "bad-soft"),
    "on-accent": ("accent", "accent-strong"),
    "on-bad": ("bad", "bad-strong"),
}
# Borders of controls, and colours of charts, upon their ground.
SHAPES = {
    name: ("surface", "ground") if name == "control" else ("surface",)
    for name in ("control", *(f"series-{n}" for n in range(1, 5)))
}


def colours(*, dark: bool) -> dict[str, str]:
    """Those of the custom properties, in one theme."""
    colour = "(#[0-9a-f]{6})"
    pairs = re.findall(rf"--([\w-]+): light-dark\({colour}, {colour}\);", STYLE)
    return {name: second if dark else first for name, first, second in pairs}


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_what_is_written_can_be_read_in_both_themes(dark: bool) -> None:
    theme = colours(dark=dark)
    for pairs, least in ((TEXTS, 4.5), (SHAPES, 3.0)):
        for name, grounds in pairs.items():
            for ground in grounds:
                found = contrast(theme[name], theme[ground])
                assert found >= least, f"{name} on {ground}: {found:.2f}"


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.name)
def test_every_colour_has_one_for_each_theme(sheet: Path) -> None:
    values = re.findall(r": ([^;{}]*#[0-9a-f]{3,8}\b[^;{}]*);", sheet.read_text())
    assert all("#" not in re.sub(r"light-dark\([^)]*\)", "", value) for value in values)


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.name)
def test_a_style_sheet_brings_nothing_from_elsewhere(sheet: Path) -> None:
    text = sheet.read_text()
    assert not re.search(r"@import|@font-face|url\((?!\s*[\"']?data:image/svg)", text)
    unknown = set(re.findall(r"var\(--([\w-]+)\)", text)) - set(
        re.findall(r"--([\w-]+):", STYLE + text)
    )
    assert not unknown


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.relative_to(SERVER)))
def test_a_template_has_no_inline_style_or_script(template: Path) -> None:
    text = template.read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:|<script(?![^>]*\ssrc=)", text)
    assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", text)
    assert "|safe" not in text.replace(" ", "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(SERVER)))
def test_a_script_makes_no_code_of_text(script: Path) -> None:
    text = script.read_text()
    assert not re.search(r"\beval\(|new Function\(|document\.write", text)


def test_the_frame_of_all_pages_is_small() -> None:
    frame = ("style.css", "components.css", "page.js", "start.js", "icons.svg", "icon.svg")
    assert sum((SERVER / "static" / name).stat().st_size for name in frame) < 60_000
