"""What the sections of the configuration have in common."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
Weight = Annotated[float, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
BASE_URL = re.compile(r"https?://[!-~]{1,2000}")


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file; an unknown key in it is an error."""
