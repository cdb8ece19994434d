"""Fine-tuning methods, one file each; a new one is one more module here, and `METHODS` has it."""

from jaxprune.methods import adalora as adalora
from jaxprune.methods import bottleneck as bottleneck
from jaxprune.methods import channelmask as channelmask
from jaxprune.methods import dora as dora
from jaxprune.methods import dplora as dplora
from jaxprune.methods import dylora as dylora
from jaxprune.methods import g2r2 as g2r2
from jaxprune.methods import lora as lora
from jaxprune.methods import loradrop as loradrop
from jaxprune.methods import lorafa as lorafa
from jaxprune.methods import oplora as oplora
from jaxprune.methods import pissa as pissa
from jaxprune.methods import prunedlora as prunedlora
from jaxprune.methods import rslora as rslora
from jaxprune.methods import sora as sora
from jaxprune.methods import squeeze as squeeze
from jaxprune.methods import vera as vera
from jaxprune.methods import weights as weights
from jaxprune.methods.base import Context as Context
from jaxprune.methods.base import Method as Method
from jaxprune.methods.base import Probes as Probes
from jaxprune.methods.base import Start as Start
from jaxprune.methods.registry import METHODS as METHODS
from jaxprune.methods.registry import Entry as Entry

# What a command that is given none trains with.
DEFAULT = "oplora"
