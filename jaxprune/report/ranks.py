"""Pictures of the rank of every site: layers down, types across."""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxprune.errors import UsageError, nearest, shown
from jaxprune.inputs import check_budget, check_sites, whole
from jaxprune.report.figure import new_figure, write_figure
from jaxprune.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

Ranks = Mapping[str, int]


def plot_ranks(
    ranks: Ranks,
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
      ranks: {site path: rank}; sites that are absent have rank 0.
      sites: the sites of the model; types stand in the order in which they first appear.
      path: file to write.
      title: first line of the title.
      budget: number of adapter parameters the ranks were planned for.

    Raises:
      UsageError: no sites, a path of `ranks` is not a site, or the file cannot be written.
    """
    write_figure(path, draw_ranks(ranks, sites, title=title, budget=budget))


def draw_ranks(ranks: Ranks, sites: Sequence[Site], *, title: str = "Ranks", budget: int | None = None) -> Figure:
    """Return the figure that `plot_ranks` writes; arguments and errors are the same."""
    budget = None if budget is None else check_budget(budget)
    grid = _grid(ranks, sites)
    params = _count(ranks, sites)
    share = f", {100 * params / budget:.1f} % of the budget of {budget:,}" if budget else ""
    width, height = grid.inches
    figure = new_figure((max(width + 1.9, 5.4), height))
    axes = figure.add_subplot()
    image = _draw(axes, grid, grid.top)
    axes.set_ylabel("layer")
    axes.set_title(f"{params:,} adapter parameters{share}", fontsize=9)
    figure.suptitle(title, fontsize=11, wrap=True)
    _bar(figure, image, [axes], grid.top)
    return figure


def rank_table(ranks: Ranks, sites: Sequence[Site]) -> str:
    """Return the ranks as an HTML table, layers down and types across, darker where a rank is higher.

    Raises:
      UsageError: no sites, or a path of `ranks` is not a site.
    """
    grid = _grid(ranks, sites)

    def cell(rank: float) -> str:
        if math.isnan(rank):
            return "<td></td>"
        share = rank / grid.top if rank else 0.0
        # Steel blue over whatever the page's background is, so that the letters can be read on a dark page too.
        colour = f' style="background:rgba(70,130,180,{0.75 * share:.2f})"' if rank else ""
        return f"<td{colour}>{rank:.0f}</td>" if rank else "<td>.</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in grid.types)
    rows = "".join(
        f"<tr><th>{layer}</th>{''.join(map(cell, row))}</tr>"
        for layer, row in zip(grid.layers, grid.ranks_LxT, strict=True)
    )
    return f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def rank_lines(ranks: Ranks, sites: Sequence[Site], *, letters: bool = False) -> list[str]:
    """Return the ranks as lines of text, layers down and types across, `.` for 0.

    Args:
      ranks: {site path: rank}.
      sites: the sites of the model.
      letters: head the columns by letters, and say below what they stand for.

    Raises:
      UsageError: no sites, or a path of `ranks` is not a site.
    """
    grid = _grid(ranks, sites)
    cells = [["" if math.isnan(rank) else f"{rank:.0f}" if rank else "." for rank in row] for row in grid.ranks_LxT]
    heads = [chr(ord("A") + i) if i < 26 else str(i) for i in range(len(grid.types))] if letters else grid.types
    rows = [["layer", *heads], *([str(layer), *row] for layer, row in zip(grid.layers, cells, strict=True))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    legend = [f"{head}: {name}" for head, name in zip(heads, grid.types, strict=True)] if letters else []
    return [lines[0], "-" * len(lines[0]), *lines[1:], *legend]


def plot_ranks_before_after(
    before: Ranks,
    after: Ranks,
    sites: Sequence[Site],
    path: str | os.PathLike[str],
    *,
    title: str = "Ranks before and after pruning",
) -> None:
    """Draw the ranks before and after pruning side by side, in the same colours, as a PNG (Figure 2 of DPLoRA, twice).

    A site that had a rank and has none after pruning is grey and crossed out; one that never had any is white.

    Args:
      before: {site path: rank} before the first pruning event; absent sites have rank 0.
      after: {site path: rank} at the end of the run, of the same form.
      sites: the sites of the model; types stand in the order in which they first appear.
      path: file to write.
      title: first line of the title.

    Raises:
      UsageError: no sites, a path of `before` or `after` is not a site, or the file cannot be written.
    """
    from matplotlib.lines import Line2D

    grids = _grid(before, sites), _grid(after, sites)
    counts = _count(before, sites), _count(after, sites)
    top = max(grid.top for grid in grids)
    removed_LxT = (grids[0].ranks_LxT > 0) & (grids[1].ranks_LxT == 0)

    width, height = grids[0].inches
    figure = new_figure((2 * max(width, 3.2) + 2.1, height + 0.3 * removed_LxT.any()))
    left, right = figure.subplots(1, 2)
    _draw(left, grids[0], top)
    image = _draw(right, grids[1], top, removed_LxT)
    left.set_ylabel("layer")
    share = f" ({100 * counts[1] / counts[0]:.1f} %)" if counts[0] else ""
    left.set_title(f"before: {counts[0]:,} adapter parameters", fontsize=9)
    right.set_title(f"after: {counts[1]:,} adapter parameters{share}", fontsize=9)
    figure.suptitle(title, fontsize=11, wrap=True)
    if removed := int(removed_LxT.sum()):
        cell = Line2D([], [], ls="", marker="s", color=_REMOVED, markersize=11)
        cross = Line2D([], [], ls="", marker="x", color=_REMOVED_INK, markersize=4.5)
        label = f"had a rank, removed by pruning ({removed} of {int((grids[0].ranks_LxT > 0).sum())})"
        handle: Any = (cell, cross)  # drawn one on the other, which the type of `legend` does not know
        figure.legend([handle], [label], loc="outside lower center", fontsize=8.5, frameon=False)
    _bar(figure, image, [left, right], top)
    write_figure(path, figure)


_REMOVED, _REMOVED_INK = "#dcdcdc", "#404040"


class _Grid(NamedTuple):
    """Ranks by layer and type (NaN where there is no site), the names of the types, and the layers."""

    ranks_LxT: np.ndarray
    types: list[str]
    layers: Sequence[int]

    @property
    def top(self) -> int:
        return max(int(np.nanmax(self.ranks_LxT)), 1)

    @property
    def inches(self) -> tuple[float, float]:
        """Width of the cells, and height with titles."""
        rows, columns = self.ranks_LxT.shape
        return 0.62 * columns, 0.27 * rows + 1.7


def _draw(axes: Axes, grid: _Grid, top: int, removed_LxT: np.ndarray | None = None) -> QuadMesh:
    """Draw one map of ranks, in colours for the ranks 1 to `top`, with removed sites crossed out."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patches import Rectangle

    # One colour a rank, from pale to dark in even steps of lightness, told apart with any colour vision; 0 is white.
    colours = colormaps["cividis_r"].resampled(top + 1)
    shown = np.ma.masked_where(~(grid.ranks_LxT > 0), grid.ranks_LxT)
    image = axes.pcolormesh(
        shown, cmap=colours, norm=BoundaryNorm(np.arange(0.5, top + 1), colours.N), edgecolors="#d0d0d0", linewidth=0.5
    )
    for (row, column), rank in np.ndenumerate(grid.ranks_LxT):
        if math.isnan(rank):
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor="none", edgecolor="#c0c0c0", hatch="////", lw=0))
            continue
        text, size, ink = f"{rank:.0f}", 8, _ink(*image.to_rgba(rank)[:3]) if rank else "#8c8c8c"
        if removed_LxT is not None and removed_LxT[row, column]:
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=_REMOVED, edgecolor="white", lw=0.5))
            text, size, ink = "×", 11, _REMOVED_INK
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=ink)
    rows, columns = grid.ranks_LxT.shape
    axes.set_xticks(
        np.arange(columns) + 0.5, grid.types, rotation=35 if max(map(len, grid.types)) > 5 else 0, fontsize=8.5
    )
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if label.get_rotation() else "center")
        label.set_rotation_mode("anchor")
    axes.set_yticks(np.arange(rows) + 0.5, [str(layer) for layer in grid.layers], fontsize=8.5)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_color("#d0d0d0")
    return image


def _bar(figure: Figure, image: QuadMesh, axes: list[Axes], top: int) -> None:
    step = max(1, math.ceil(top / 8))
    ticks = sorted({1, *range(step, top - step // 2, step), top})
    bar = figure.colorbar(image, ax=axes, label="rank", ticks=ticks, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=8.5)
    bar.minorticks_off()


def _count(ranks: Ranks, sites: Sequence[Site]) -> int:
    """Return the adapter parameters sum_i r_i (d_in + d_out)."""
    return sum(site.cost(ranks.get(site.path, 0)) for site in sites)


def _grid(ranks: Ranks, sites: Sequence[Site]) -> _Grid:
    sites = check_sites(sites)
    known = {site.path for site in sites}
    if not isinstance(ranks, Mapping):
        raise UsageError(f"ranks {shown(ranks)} cannot be used: expected {{site path: rank}}, such as plan.ranks")
    for path in ranks:
        if path not in known:
            near = nearest(str(path), known)
            raise UsageError(f"ranks name {shown(path)}, which is not a site; nearest names: {near}")
    cells = {}
    for site in sites:
        rank = whole(ranks.get(site.path, 0))
        if rank is None or rank < 0:
            raise UsageError(
                f"rank {shown(ranks[site.path])} at {shown(site.path)} is wrong: expected a whole number, 0 or more"
            )
        cells[site.layer, _role(site)] = rank
    roles = list(dict.fromkeys(map(_role, sites)))
    layers = range(min(layer for layer, _ in cells), max(layer for layer, _ in cells) + 1)
    grid = np.array([[cells.get((layer, role), np.nan) for role in roles] for layer in layers])
    return _Grid(grid, [_short(role, roles) for role in roles], layers)


def _role(site: Site) -> str:
    """Return a site's path without the number of its layer: what it has in common with those of other layers."""
    parents, slash, _ = site.module.rpartition("/")
    return re.sub(r"\d+", "#", parents, count=1) + slash + site.type


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
