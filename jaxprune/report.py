"""Put a run on disk: the picture of its ranks, and its numbers as JSON. Every file appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.errors import UsageError, nearest
from jaxprune.sites import Site

_DPI = 150


def plot_ranks(
    ranks: Mapping[str, int | Sequence[int]],
    sites: Sequence[Site],
    path: str | os.PathLike[str],
    *,
    title: str = "Ranks",
    budget: int | None = None,
) -> None:
    """Draw the rank of every site, layers down and types across, as a PNG.

    Below the title stand the adapter parameters sum_i r_i (d_in + d_out) and their share of the budget. A site of rank
    0 is white, a layer that has no such site is hatched.

    Args:
      ranks: {site path: rank}; sites that are absent have rank 0. A site stacked by `nn.scan` may have one rank for
        every layer of the stack.
      sites: the sites of the model; types stand in the order in which they first appear.
      path: file to write.
      title: first line of the title.
      budget: number of adapter parameters the ranks were planned for.

    Raises:
      UsageError: no sites, a path of `ranks` is not a site, or the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    grid_LxT, types, layers = _grid(ranks, sites)
    rows, columns = grid_LxT.shape
    params = sum(
        int(np.broadcast_to(ranks.get(site.path, 0), site.stack).sum()) * (site.d_in + site.d_out) for site in sites
    )
    share = f", {100 * params / budget:.1f} % of the budget of {budget:,}" if budget else ""
    top = max(int(np.nanmax(grid_LxT)), 1)

    width, height = max(0.62 * columns + 1.9, 5.4), 0.27 * rows + 1.7
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    # One colour a rank, from pale to dark in even steps of lightness, told apart with any colour vision; 0 is white.
    colours = colormaps["cividis_r"].resampled(top + 1)
    shown = np.ma.masked_where(~(grid_LxT > 0), grid_LxT)
    image = axes.pcolormesh(
        shown, cmap=colours, norm=BoundaryNorm(np.arange(0.5, top + 1), colours.N), edgecolors="#d0d0d0", linewidth=0.5
    )
    for (row, column), rank in np.ndenumerate(grid_LxT):
        if math.isnan(rank):
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor="none", edgecolor="#c0c0c0", hatch="////", lw=0))
            continue
        axes.text(
            column + 0.5, row + 0.5, f"{rank:.0f}", ha="center", va="center", fontsize=8,
            color=_ink(*image.to_rgba(rank)[:3]) if rank else "#8c8c8c",
        )  # fmt: skip
    axes.set_xticks(np.arange(columns) + 0.5, types, rotation=35 if max(map(len, types)) > 5 else 0, fontsize=8.5)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if label.get_rotation() else "center")
        label.set_rotation_mode("anchor")
    axes.set_yticks(np.arange(rows) + 0.5, [str(layer) for layer in layers], fontsize=8.5)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_ylabel("layer")
    axes.set_title(f"{params:,} adapter parameters{share}", fontsize=9)
    figure.suptitle(title, fontsize=11, wrap=True)
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    step = max(1, math.ceil(top / 8))
    ticks = sorted({1, *range(step, top - step // 2, step), top})
    bar = figure.colorbar(image, ax=axes, label="rank", ticks=ticks, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=8.5)
    bar.minorticks_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    _write(Path(path), picture.getvalue())


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object as an indented JSON file that readers see whole, old or new.

    NumPy and JAX values become numbers and lists; NaN and infinity, which JSON lacks, become null.

    Raises:
      UsageError: the file cannot be written.
      TypeError: the object holds something JSON has no form for.
    """
    _write(Path(path), (json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n").encode())


def append_jsonl(path: str | os.PathLike[str], obj: Any) -> None:
    """Append an object to a file with one JSON object a line, converted as in `write_json`.

    A last line that was cut off when the process before was killed is ended first, so that only that line is lost.

    Raises:
      UsageError: the file cannot be written.
      TypeError: the object holds something JSON has no form for.
    """
    line = (json.dumps(_plain(obj), allow_nan=False) + "\n").encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name a file that can be written") from None


def _grid(
    ranks: Mapping[str, int | Sequence[int]], sites: Sequence[Site]
) -> tuple[np.ndarray, list[str], Sequence[int]]:
    """Return ranks by layer and type (NaN where there is no site), the names of the types, and the layers."""
    known = {site.path for site in sites}
    if not sites:
        raise UsageError("there are no sites to draw; find_sites gives those of a model")
    for path in ranks:
        if path not in known:
            raise UsageError(f"ranks name {path!r}, which is not a site; nearest names: {nearest(path, known)}")
    cells = {}
    for site in sites:
        own = np.broadcast_to(ranks.get(site.path, 0), site.stack).ravel()
        for layer, rank in enumerate(own, start=site.layer):
            cells[layer, _role(site)] = int(rank)
    roles = list(dict.fromkeys(map(_role, sites)))
    layers = range(min(layer for layer, _ in cells), max(layer for layer, _ in cells) + 1)
    grid = np.array([[cells.get((layer, role), np.nan) for role in roles] for layer in layers])
    return grid, [_short(role, roles) for role in roles], layers


def _role(site: Site) -> str:
    """Return a site's path without the number of its layer: what it has in common with those of other layers."""
    parents, slash, name = site.path.rpartition("/")
    return re.sub(r"\d+", "#", parents, count=1) + slash + name


def _short(role: str, roles: Sequence[str]) -> str:
    """Return the fewest last parts of a path that tell it from the others."""
    parts = role.split("/")
    for count in range(1, len(parts) + 1):
        suffix = parts[-count:]
        if sum(other.split("/")[-count:] == suffix for other in roles) == 1:
            break
    return "/".join(suffix)


def _ink(*rgb: float) -> str:
    """Return the colour of letters that can be read on a background, by its relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    # Black and white contrast equally at 0.179.
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [_plain(value) for value in obj]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist())
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror}; name a file that can be written") from None
