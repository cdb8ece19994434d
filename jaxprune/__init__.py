"""Low-rank adapters in JAX whose ranks are chosen by optimisation and pruned while they train.

A model stays as it is. What is trained is a plain dict
{site path: adapter}, with a 0/1 mask for the rank components of each; a
*site* is one matrix of the model. A *plan* gives every site a rank, and a
*method* is a tuple of pure functions that makes the plan, and may prune
while it trains:

    import flax.linen as nn, jax, jax.numpy as jnp, optax, jaxprune as jp
    model, batch = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(1)]), jnp.ones((8, 32))
    params = model.init(jax.random.key(0), batch)["params"]
    loss, forward = lambda apply, batch, key: jnp.mean(apply(batch) ** 2), jp.attach(model)
    sites = jp.find_sites(params, call=lambda params: model.apply({"params": params}, batch))
    run = jp.training(forward, loss, optax.adamw(1e-3), jp.oplora(budget=500))
    state, params, plan = run.start(jax.random.key(1), params, sites, [batch])
    state, metrics = run.step(params, state, batch)
    print(plan, state, metrics["loss"])

Printing a plan, a state or an adapter gives a few lines;
`print(plan.table())` gives all ranks, `plan.plot()` a picture.

The rooms, each with a docstring of its own:

    sites       the matrices of a model
    adapters    LoRA and its relatives, one file a kind
    attaching   run a model with adapters
    scores      what a site is worth
    allocation  scores and a budget in, ranks out
    surgery     mask, compact and extract
    methods     one file a method, with its paper and equations
    train       state, step, pruning events, loop
    optim       what adapters ask of an Optax chain
    checkpoint  save and restore a whole state
    peft        Hugging Face PEFT folders, both ways
    models      encoders, decoders, their checkpoints and texts
    report      pictures and pages of runs
    runs        predict with what a run left
    writing     write with a decoder and its adapters

On the command line, `python -m jaxprune inspect FOLDER` says what lies in
a folder, `merge` makes adapters and their model an ordinary checkpoint,
`resize` lowers an adapter to a budget, and `generate` writes with a
decoder.
"""

from types import ModuleType as _ModuleType

from jaxprune.adapters import Bottleneck as Bottleneck
from jaxprune.adapters import Dora as Dora
from jaxprune.adapters import Gated as Gated
from jaxprune.adapters import Lora as Lora
from jaxprune.adapters import LoraFA as LoraFA
from jaxprune.adapters import MaskedDora as MaskedDora
from jaxprune.adapters import Svd as Svd
from jaxprune.adapters import Vera as Vera
from jaxprune.adapters import count as count
from jaxprune.adapters import init_lora as init_lora
from jaxprune.adapters import init_weights as init_weights
from jaxprune.adapters import merge as merge
from jaxprune.adapters import to_dora as to_dora
from jaxprune.adapters import with_weights as with_weights
from jaxprune.allocation import Plan as Plan
from jaxprune.allocation import TimeModel as TimeModel
from jaxprune.allocation import allocate as allocate
from jaxprune.allocation import captured_energy as captured_energy
from jaxprune.allocation import component_problem as component_problem
from jaxprune.allocation import default_budget as default_budget
from jaxprune.allocation import prune_problem as prune_problem
from jaxprune.allocation import solve as solve
from jaxprune.allocation import step_time as step_time
from jaxprune.allocation import uniform_plan as uniform_plan
from jaxprune.attaching import attach as attach
from jaxprune.attaching import attach_function as attach_function
from jaxprune.checkpoint import Checkpoints as Checkpoints
from jaxprune.errors import UsageError as UsageError
from jaxprune.methods import Context as Context
from jaxprune.methods import Method as Method
from jaxprune.methods import Probes as Probes
from jaxprune.methods import Start as Start
from jaxprune.methods.adalora import adalora as adalora
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
from jaxprune.methods.squeeze import squeeze as squeeze
from jaxprune.methods.vera import vera as vera
from jaxprune.methods.weights import bitfit as bitfit
from jaxprune.methods.weights import full as full
from jaxprune.peft import load_adapters as load_adapters
from jaxprune.peft import load_peft as load_peft
from jaxprune.peft import resize as resize
from jaxprune.peft import save_adapters as save_adapters
from jaxprune.peft import save_peft as save_peft
from jaxprune.runs import LoadedRun as LoadedRun
from jaxprune.runs import load_run as load_run
from jaxprune.scores import gradient_spectra as gradient_spectra
from jaxprune.scores import site_scores as site_scores
from jaxprune.sites import Site as Site
from jaxprune.sites import find_sites as find_sites
from jaxprune.surgery import Decision as Decision
from jaxprune.surgery import extract as extract
from jaxprune.train import NonFiniteError as NonFiniteError
from jaxprune.train import Training as Training
from jaxprune.train import TrainState as TrainState
from jaxprune.train import compactable as compactable
from jaxprune.train import compacted as compacted
from jaxprune.train import fit as fit
from jaxprune.train import init_state as init_state
from jaxprune.train import make_predict as make_predict
from jaxprune.train import make_step as make_step
from jaxprune.train import prune as prune
from jaxprune.train import training as training
from jaxprune.writing import Writer as Writer
from jaxprune.writing import load_writer as load_writer

__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    name for name, value in globals().items() if not (name.startswith("_") or isinstance(value, _ModuleType))
)


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
    from importlib.metadata import version

    return version("jaxprune")


def __dir__() -> list[str]:
    return sorted({*globals(), "__version__"} - {"_ModuleType"})
