"""The SDKs of OpenAI and Anthropic send images, and read the same answer about them."""

from __future__ import annotations

from pathlib import Path

from tests.support.client_programs import PYTHON_OF_CLIENTS, run
from tests.support.process_box import StartBox
from tests.support.tiny_vision import image, put


def test_images_of_all_sdks_are_seen(module_box: StartBox, tmp_path: Path) -> None:
    put(tmp_path / "models")
    box = module_box(config=f'models_dir = "{tmp_path / "models"}"\n')
    files = [tmp_path / "red.png", tmp_path / "blue.png"]
    for file, colour in zip(files, ((200, 0, 0), (0, 0, 200)), strict=True):
        file.write_bytes(image(*colour))
    script = Path(__file__).with_name("images.py")
    command = [PYTHON_OF_CLIENTS, script, box.url, box.key, "tiny:latest", *files]
    red, blue = run([*map(str, command)], tmp_path).splitlines()
    assert red != blue
