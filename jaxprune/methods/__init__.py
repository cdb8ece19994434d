"""Fine-tuning methods, one file each."""

from jaxprune.methods.adalora import adalora as adalora
from jaxprune.methods.base import Context as Context
from jaxprune.methods.base import Method as Method
from jaxprune.methods.base import Probes as Probes
from jaxprune.methods.base import Start as Start
from jaxprune.methods.bottleneck import houlsby as houlsby
from jaxprune.methods.bottleneck import pfeiffer as pfeiffer
from jaxprune.methods.channelmask import channelmask as channelmask
from jaxprune.methods.channelmask import uniformmask as uniformmask
from jaxprune.methods.dora import dora as dora
from jaxprune.methods.dora import with_dora as with_dora
from jaxprune.methods.dplora import dplora as dplora
from jaxprune.methods.dylora import dylora as dylora
from jaxprune.methods.g2r2 import g2r2 as g2r2
from jaxprune.methods.lora import lora as lora
from jaxprune.methods.loradrop import loradrop as loradrop
from jaxprune.methods.lorafa import lorafa as lorafa
from jaxprune.methods.oplora import oplora as oplora
from jaxprune.methods.pissa import pissa as pissa
from jaxprune.methods.prunedlora import prunedlora as prunedlora
from jaxprune.methods.rslora import rslora as rslora
from jaxprune.methods.sora import sora as sora
from jaxprune.methods.vera import vera as vera
from jaxprune.methods.weights import bitfit as bitfit
from jaxprune.methods.weights import full as full
