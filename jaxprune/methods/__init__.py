"""Fine-tuning methods, one file each."""

from jaxprune.methods.base import Context as Context
from jaxprune.methods.base import Method as Method
from jaxprune.methods.base import Start as Start
from jaxprune.methods.lora import lora as lora
from jaxprune.methods.oplora import oplora as oplora
from jaxprune.methods.weights import bitfit as bitfit
from jaxprune.methods.weights import full as full
