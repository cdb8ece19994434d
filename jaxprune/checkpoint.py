"""Save and load the state of a run with Orbax, which writes aside and renames: a checkpoint is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import UsageError
from jaxprune.train import TrainState, leaf_names


def _flat(state: TrainState) -> dict[str, jax.Array]:
    # One flat dict: the file does not depend on the classes of the state. Typed keys are saved as their bits.
    named = zip(leaf_names(state), jax.tree.leaves(state), strict=True)
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def save_checkpoint(folder: str | os.PathLike[str], state: TrainState) -> Path:
    """Write the state to `folder/STEP`, replacing one of the same step.

    Args:
      folder: made if it does not exist.
      state: adapters, masks, optimiser and method state, step and random key.

    Returns:
      The checkpoint's folder.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).absolute() / str(int(state.step))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _flat(state), force=True)
    return path


def load_checkpoint(path: str | os.PathLike[str], like: TrainState) -> TrainState:
    """Read a checkpoint back.

    Args:
      path: what `save_checkpoint` returned.
      like: a state of the same run, for its structure, shapes and dtypes (`init_state` with the same settings).

    Raises:
      UsageError: there is no checkpoint, or it does not fit; the message lists what differs.

    Returns:
      The saved state.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if not (path / "_CHECKPOINT_METADATA").exists():
        raise UsageError(f"no checkpoint at {str(path)!r}; expected a folder that save_checkpoint made")
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _flat(like).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata
        found = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in dict(saved).items()}
        wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in abstract.items()}
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if wrong:
            first = wrong[0]
            raise UsageError(
                f"checkpoint {str(path)!r} does not fit: {len(wrong)} leaves differ, first {first} (saved "
                f"{found.get(first, 'nothing')}, expected {wanted.get(first, 'nothing')}); use the run's own settings"
            )
        restored = checkpointer.restore(path, abstract)
    leaves = [
        jax.random.wrap_key_data(restored[name], impl=jax.random.key_impl(leaf)) if _is_key(leaf) else restored[name]
        for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
