"""How adapters reach a model."""

from jaxprune.attach.function import attach_function as attach_function
from jaxprune.attach.linen import attach as attach
