"""Pruning as pure functions of adapters, masks and optimizer state: mask, trim, compact."""

from jaxprune.prune.compact import compact as compact
from jaxprune.prune.compact import gather as gather
from jaxprune.prune.compact import survivors as survivors
from jaxprune.prune.decision import Decision as Decision
from jaxprune.prune.decision import apply as apply
from jaxprune.prune.extract import Extracted as Extracted
from jaxprune.prune.extract import extract as extract
from jaxprune.prune.mask import live as live
from jaxprune.prune.mask import trim as trim
from jaxprune.prune.mask import zero_dead as zero_dead
from jaxprune.prune.policy import COMPACT as COMPACT
from jaxprune.prune.policy import worth_compacting as worth_compacting
