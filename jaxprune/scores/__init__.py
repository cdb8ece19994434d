"""Jitted kernels that measure how much a site or a component matters."""

from jaxprune.scores.components import component_norms as component_norms
from jaxprune.scores.gradient import SCORES as SCORES
from jaxprune.scores.gradient import site_scores as site_scores
from jaxprune.scores.sketch import LowRank as LowRank
from jaxprune.scores.sketch import gradient_spectra as gradient_spectra
from jaxprune.scores.sketch import gradient_svd as gradient_svd
from jaxprune.scores.tap import KernelTap as KernelTap
