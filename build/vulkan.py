"""The Vulkan backend, for AMD's and Intel's GPUs: its headers and compiler come from the system."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from common import Stop
from ggml_backend import Recipe, backend

HEADERS = ("vulkan/vulkan.h", "spirv/unified1/spirv.hpp")
FOLDERS = ("/usr/include", "/usr/local/include")
MINUTES = 40  # of one core, most of them for shaders
INSTALL = (
    "the Vulkan backend needs glslc and the headers of Vulkan and SPIR-V: install them (Debian,"
    " Ubuntu: apt install glslc libvulkan-dev spirv-headers; Fedora: dnf install glslc"
    " vulkan-loader-devel spirv-headers-devel; or LunarG's SDK)"
)


def made(cache: Path) -> Path:
    """The folder with the backend."""
    glslc = shutil.which("glslc")
    if not glslc or not all(map(found, HEADERS)):
        raise Stop(INSTALL)
    version = subprocess.run([glslc, "--version"], capture_output=True, text=True, check=False)
    shown = re.sub(r"\s+", " ", version.stdout)
    return backend(cache, Recipe("vulkan", ("-DGGML_VULKAN=ON",), shown, MINUTES))


def found(header: str) -> bool:
    sdk = os.environ.get("VULKAN_SDK")
    folders = [*FOLDERS, *([f"{sdk}/include"] if sdk else [])]
    return any((Path(folder) / header).exists() for folder in folders)
