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


def new_figure(inches: tuple[float, float]) -> Figure:
    """Return an empty figure that a notebook shows as a PNG, without pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
    figure._repr_png_ = lambda: png(figure)  # pyright: ignore[reportAttributeAccessIssue]
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure as a PNG.

    Raises:
      UsageError: the file cannot be written.
    """
    write_whole(Path(path), png(figure))
