"""Training: one state, one jitted step, events between steps, and a loop."""

from jaxprune.train.events import compactable as compactable
from jaxprune.train.events import compacted as compacted
from jaxprune.train.events import prune as prune
from jaxprune.train.loop import NonFiniteError as NonFiniteError
from jaxprune.train.loop import fit as fit
from jaxprune.train.placement import leaf_names as leaf_names
from jaxprune.train.placement import place as place
from jaxprune.train.run import Training as Training
from jaxprune.train.run import training as training
from jaxprune.train.state import TrainState as TrainState
from jaxprune.train.state import init_state as init_state
from jaxprune.train.state import make_predict as make_predict
from jaxprune.train.state import make_step as make_step
