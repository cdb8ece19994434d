"""How adapters reach a model."""

from jaxprune.attaching.function import attach_function as attach_function
from jaxprune.attaching.linen import attach as attach
