"""The SDKs of OpenAI and Anthropic send images, and read the same answer about them."""

from __future__ import annotations

from pathlib import Path

from tests.support.client_programs import PYTHON_OF_CLIENTS, run
from tests.support.process_box import StartBox
from tests.support.tiny_vision import image, put


def test_images_of_all_sdks_are_seen(module_box: StartBox, tmp_path: Path) -> None:
    put(tmp_path / "models")
    box = module_box(config=f'models_dir = "{tmp_path / "models"}"\n')
    script = str(Path(__file__).with_name("images.py"))
    said = []
    for number, colour in enumerate(((200, 0, 0), (0, 0, 200))):
        file = tmp_path / f"{number}.png"
        file.write_bytes(image(*colour))
        command = [str(PYTHON_OF_CLIENTS), script, box.url, box.key, "tiny:latest", str(file)]
        said.append(run(command, tmp_path))
    assert said[0] != said[1]
