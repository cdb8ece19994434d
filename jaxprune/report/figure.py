"""Put a picture on disk."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxprune.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure as a PNG.

    Raises:
      UsageError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(Path(path), picture.getvalue())
