"""Pruning as pure functions of adapters, masks and optimizer state: rotate, mask, trim, compact."""

from jaxprune.surgery.compaction import compact as compact
from jaxprune.surgery.compaction import gather as gather
from jaxprune.surgery.compaction import survivors as survivors
from jaxprune.surgery.decision import Decision as Decision
from jaxprune.surgery.decision import apply as apply
from jaxprune.surgery.extraction import Extracted as Extracted
from jaxprune.surgery.extraction import extract as extract
from jaxprune.surgery.mask import live as live
from jaxprune.surgery.mask import trim as trim
from jaxprune.surgery.mask import zero_dead as zero_dead
from jaxprune.surgery.policy import COMPACT as COMPACT
from jaxprune.surgery.policy import worth_compacting as worth_compacting
from jaxprune.surgery.rotation import BASES as BASES
from jaxprune.surgery.rotation import Basis as Basis
from jaxprune.surgery.rotation import rotate as rotate
from jaxprune.surgery.rotation import rotate_adapters as rotate_adapters
from jaxprune.surgery.rotation import rotate_gradients as rotate_gradients
from jaxprune.surgery.rotation import svd_bases as svd_bases
