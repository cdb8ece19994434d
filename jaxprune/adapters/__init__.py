"""The kinds of adapters, one file each."""

from jaxprune.adapters.base import Adapter as Adapter
from jaxprune.adapters.base import Adapters as Adapters
from jaxprune.adapters.base import Masks as Masks
from jaxprune.adapters.lora import Lora as Lora
from jaxprune.adapters.lora import init_lora as init_lora
from jaxprune.adapters.merge import count as count
from jaxprune.adapters.merge import merge as merge
from jaxprune.adapters.weight import Weight as Weight
from jaxprune.adapters.weight import init_weights as init_weights
