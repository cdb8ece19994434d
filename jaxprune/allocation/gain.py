"""What a rank gains at a site: by the paper's formula, or by the measured spectrum of the site's gradient.

    paper:      gain(l, r) = I_l (1 - exp(-r / min(d_in, d_out)))         (DPLoRA, eq. 2)
    effective:  gain(l, r) = I_l (1 - exp(-r / M_l)),  M_l = exp(-sum_j p_j log p_j),  p_j = s_j^2 / sum_i s_i^2
    energy:     gain(l, r) = sum_{j <= r} s_j^2

with s the singular values of the gradient of the loss with respect to the kernel, falling. M_l, its effective rank, is n where n
directions share the energy equally. Eq. 2 is linear up to rank 16 at any real width, so its plans are all or nothing; the other
two bend where the gradient does. `energy` is how much of a step of gradient descent on the kernels a plan can follow. Share of it
that plans of up to rank 16 capture, MiniLM on MRPC, of the dense gradients:

| parameters of | paper | effective | energy | uniform |
| --- | --- | --- | --- | --- |
| uniform rank 8 | 0.812 | 0.994 | 0.996 | 0.994 |
| uniform rank 2 | 0.644 | 0.970 | 0.986 | 0.972 |
| uniform rank 1 | 0.526 | 0.903 | 0.965 | 0.923 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_rank_of_each, some
from jaxprune.sites import Site

GAINS = ("paper", "effective", "energy")

Spectra = Mapping[str, Sequence[float] | np.ndarray]


def gain_curve(gain: str, site: Site, ranks: np.ndarray, energies: np.ndarray | None) -> np.ndarray:
    """Return the share of a site's importance that each rank gains, (K,), from 0 to 1.

    Args:
      gain: one of `GAINS`.
      site: gives d_in and d_out.
      ranks: (K,).
      energies: s_j^2, falling; None for the paper's gain.
    """
    if energies is None:
        return -np.expm1(-ranks / min(site.d_in, site.d_out))
    total = energies.sum() or 1.0
    if gain == "energy":
        return np.minimum(_first(energies, ranks) / total, 1.0)
    shares = energies[energies > 0] / total
    return -np.expm1(-ranks / np.exp(-np.sum(shares * np.log(shares))))


def captured_energy(ranks: Mapping[str, int], spectra: Spectra) -> float:
    """Return the share of the gradients' energy that lies in each site's r_l largest directions.

        sum_l sum_{j <= r_l} s_lj^2 / sum_l sum_j s_lj^2

    Args:
      ranks: {site path: rank}, such as `plan.ranks`; a site that it lacks has rank 0.
      spectra: {site path: singular values}, from `gradient_spectra`.

    Raises:
      UsageError: a rank is no whole number, 0 or more, a path has no spectrum, or a spectrum cannot be used.

    Returns:
      From 0 to 1; of the energy in the singular values that are given, which leaves out what a sketch does not see.
    """
    energies = check_spectra(spectra)
    sites = [Site(path, 1, 1, 0, "") for path in energies]
    steps = check_rank_of_each({**dict.fromkeys(energies, 0), **ranks}, sites)
    total = sum(energy.sum() for energy in energies.values())
    if not total:
        raise UsageError("every singular value is 0, so there is no energy to capture; check the gradients")
    return float(sum(_first(e, r) for e, r in zip(energies.values(), steps, strict=True)) / total)


def check_spectra(spectra: Spectra | None) -> dict[str, np.ndarray]:
    """Return the squared singular values of every site, falling; anything but finite numbers, 0 or more, is a UsageError."""
    if not isinstance(spectra, Mapping) or not spectra:
        raise UsageError(f"spectra {shown(spectra)} cannot be used: expected what gradient_spectra returns")
    energies: dict[str, np.ndarray] = {}
    for path, spectrum in spectra.items():
        values = np.asarray(spectrum)
        if values.ndim != 1 or not values.size or values.dtype.kind not in "fiu":
            raise UsageError(f"the spectrum at {shown(path)} is {shown(spectrum)}; expected a list of singular values")
        with np.errstate(over="ignore"):
            energies[path] = -np.sort(-np.square(values.astype(np.float64)))
    wrong = [p for p, s in spectra.items() if not (np.asarray(s) >= 0).all() or not np.isfinite(energies[p]).all()]
    if wrong:
        raise UsageError(f"singular values must be finite and none negative, which they are not at {some(wrong)}")
    return energies


def _first(energies: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Add up the first energies, as many as each rank says."""
    return np.concatenate([[0.0], np.cumsum(energies)])[np.minimum(ranks, len(energies))]
