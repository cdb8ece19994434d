"""A plan: an integer rank per site, with how it was found and how far from the best it can be."""

from __future__ import annotations

import html
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxprune.inputs import check_rank_of_each, check_sites
from jaxprune.sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 80


@dataclass(frozen=True, repr=False)
class Plan:
    """An integer rank per site.

    Attributes:
      ranks: site path -> rank, zeros included.
      objective: what the plan is worth, in the unit of the scores, or the loss that a pruning problem minimises; NaN
        where nothing was optimised.
      status: a sentence on how the plan was found and whether it is proved best.
      gap: (bound - objective) / |objective|, 0 when proved; no plan is worth more than the bound.
      seconds: wall-clock time of solving, without the import of CVXPY.
      solver: the solver that found it.
      budget: adapter parameters that could be spent.
      cost: adapter parameters that the plan takes.
      sites: the sites, in the order they were given.
      warnings: what was mended in the input, a sentence each.
      time: predicted step time relative to uniform rank 16; None where no time budget was given.
    """

    ranks: dict[str, int]
    objective: float
    status: str
    gap: float
    seconds: float
    solver: str
    budget: int
    cost: int
    sites: tuple[Site, ...]
    warnings: tuple[str, ...] = ()
    time: float | None = None

    def __repr__(self) -> str:
        ranks = [rank for rank in self.ranks.values() if rank]
        span = f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no rank"
        return (
            f"Plan({len(ranks)} of {len(self.ranks)} sites, {span}, {self.cost:,} of {self.budget:,} parameters, "
            f"{self.solver})"
        )

    def _repr_html_(self) -> str:
        """Return the table of ranks for a notebook, darker where a rank is higher."""
        from jaxprune.report.ranks import rank_table

        return f"{rank_table(self.ranks, self.sites)}<p>{html.escape(self.summary())}<br>{html.escape(self.status)}</p>"

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str = "Ranks") -> Figure:
        """Draw the ranks, layers down and types across, as `jaxprune.report.plot_ranks` does.

        Args:
          path: PNG file to write as well.
          title: first line of the title.

        Raises:
          UsageError: the file cannot be written.

        Returns:
          The figure, which a notebook shows.
        """
        from jaxprune.report.figure import write_figure
        from jaxprune.report.ranks import draw_ranks

        figure = draw_ranks(self.ranks, self.sites, title=title, budget=self.budget or None)
        if path is not None:
            write_figure(path, figure)
        return figure

    def table(self) -> str:
        """Lay the ranks out as text, layers down and types across, `.` for 0, with totals; 80 columns if short names allow.

        Several sites of one type in one layer share a cell: `4+8`, or `sum 64` when there are more than two.
        """
        types = list(dict.fromkeys(s.type for s in self.sites))
        cells: dict[tuple[int, str], list[int]] = defaultdict(list)
        params: dict[int, int] = defaultdict(int)
        for site in self.sites:
            cells[site.layer, site.type].append(self.ranks[site.path])
            params[site.layer] += site.cost(self.ranks[site.path])
        layers = sorted(params)
        head = ["layer", *types, "ranks", "parameters"]
        body = [
            [str(n), *(_cell(cells[n, t]) for t in types), _dot(sum(sum(cells[n, t]) for t in types)), _dot(params[n])]
            for n in layers
        ]
        sums = [sum(sum(cells[n, t]) for n in layers) for t in types]
        foot = ["total", *map(_dot, sums), _dot(sum(sums)), _dot(sum(params.values()))]
        lines: list[str] = []
        for longest in range(max(3, *map(len, types)), 2, -1):  # shorten the type names only as far as the width asks
            rows = [[head[0], *(t[:longest] for t in types), *head[-2:]], *body, foot]
            widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
            lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
            if len(lines[0]) <= WIDTH:
                break
        rule = "-" * len(lines[0])
        timing = [] if self.time is None else [time_line(self.time, self.ranks, self.sites)]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], self.summary(), *timing])

    def summary(self) -> str:
        """Say in one sentence how many sites and layers are adapted, with how many parameters."""
        adapted = [site for site in self.sites if self.ranks[site.path]]
        layers = [len({site.layer for site in some}) for some in (adapted, self.sites)]
        return (
            f"{len(adapted)} of {len(self.sites)} sites in {layers[0]} of {layers[1]} layers, "
            f"{self.cost:,} of {self.budget:,} adapter parameters"
        )


def time_line(time: float, ranks: Mapping[str, int], sites: Sequence[Site]) -> str:
    """Say a predicted step time and where back-propagation ends."""
    lowest = min((s.layer for s in sites if ranks[s.path]), default=None)
    end = "there is no back-propagation" if lowest is None else f"back-propagation ends at layer {lowest}"
    return f"Predicted step time {time:.2f} of uniform rank 16; {end}"


def uniform_plan(sites: Sequence[Site], rank: int) -> Plan:
    """Give every site the same rank: plain LoRA, and the yardstick of an optimised plan.

    Raises:
      UsageError: the rank is not a whole number, or negative.
    """
    sites = check_sites(sites)
    rank = int(check_rank_of_each([rank] * len(sites), sites)[0])
    cost = sum(s.cost(rank) for s in sites)
    status = f"Uniform: rank {rank} at each of {len(sites)} sites, nothing optimised."
    return Plan({s.path: rank for s in sites}, math.nan, status, math.nan, 0.0, "uniform", cost, cost, sites)


def _dot(number: int) -> str:
    return f"{number:,}" if number else "."


def _cell(ranks: list[int]) -> str:
    if len(ranks) > 2:
        return f"sum {sum(ranks)}" if any(ranks) else "."
    return "+".join(map(str, ranks)) if any(ranks) else "."
