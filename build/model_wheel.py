"""The default model as a wheel: pip puts the file where the package looks for it (models.bundled).

Our own wheel is small and for every platform; who installs with pip chooses the model or not.
"""

import zipfile
from pathlib import Path

from llama import EARLIEST, record

NAME = "pinaivu_smollm2"
METADATA = """\
Metadata-Version: 2.4
Name: pinaivu-smollm2
Version: {version}
Summary: SmolLM2 135M Instruct, the default model of Pinaivu Box
License-Expression: Apache-2.0
License-File: LICENSE
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: build/release
Root-Is-Purelib: true
Tag: py3-none-any
"""


def make(folder: Path, model: Path, license: Path, version: str) -> Path:
    """Writes the wheel into the folder; the same model makes the same bytes."""
    target = folder / f"{NAME}-{version}-py3-none-any.whl"
    about = f"{NAME}-{version}.dist-info"
    texts = {
        f"{about}/METADATA": METADATA.format(version=version).encode(),
        f"{about}/WHEEL": WHEEL.encode(),
        f"{about}/licenses/LICENSE": license.read_bytes(),
        f"{NAME}-{version}.data/data/share/pinaivu/models/{model.name}": model.read_bytes(),
    }
    lines = [record(name, content) for name, content in texts.items()]
    lines.append(f"{about}/RECORD,,\n")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*texts.items(), (f"{about}/RECORD", "".join(lines).encode())]:
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
    return target
