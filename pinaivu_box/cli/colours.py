"""Whether terminals are sent colours, bold and dim text (https://no-color.org)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def are_wanted() -> bool:
    """Not if NO_COLOR is set to anything, nor on a terminal that knows none."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Names are printed as they are, even if they look like rich's markup."""
    from rich.console import Console

    return Console(
        stderr=stderr,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        color_system="auto" if are_wanted() else None,
    )
