"""Checkpoints of a run with Orbax: the whole state, and a JSON description from which its shapes are rebuilt.

Pruning changes shapes while a run goes, so a checkpoint says itself what it holds: adapters, masks and everything made from them
are rebuilt from its description, then filled. Writing happens in the background, aside and renamed: a checkpoint is whole or
not there, whenever the process dies.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import adapters as kinds_of_adapters
from jaxprune.adapters.base import leaves_of
from jaxprune.errors import UsageError
from jaxprune.methods.base import Method
from jaxprune.sites import Site
from jaxprune.train import TrainState, init_state, leaf_names


class Checkpoints:
    """The checkpoints in one folder; use it in a `with` statement, whose end waits for the last one to be written.

    Args:
      folder: made when the first checkpoint is saved.
      keep: how many of the latest are kept; the one with the best score is kept besides.
      kinds: your own kinds of adapters, where a run has any; jaxprune's are known.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, kinds: Sequence[type] = ()) -> None:
        if keep < 1:
            raise UsageError(f"keep {keep} is out of range; expected at least 1 checkpoint")
        self.folder, self._keep, self._opened = Path(folder).absolute(), keep, None
        known = [kind for kind in vars(kinds_of_adapters).values() if isinstance(kind, type)]
        self._kinds: dict[str, type] = {kind.__name__: kind for kind in (*known, *kinds)}

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def steps(self) -> list[int]:
        """List the steps with a whole checkpoint, the latest last."""
        return sorted(self._manager.all_steps(read=True)) if self.folder.is_dir() else []

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None, *, score: float | None = None) -> None:
        """Save a state under its step, in the background; what was saved under that step before is replaced.

        Args:
          state: may be donated to the next step at once.
          extra: what else to remember, anything JSON can hold.
          score: larger is better; decides which checkpoint is the best.

        Raises:
          UsageError: the folder cannot be written.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        # Copies, because the next step may overwrite the buffers before they are written.
        arrays = {name: jnp.copy(leaf) for name, leaf in _flat(state).items()}
        description = {"adapters": _describe(state.adapters), "masks": _shapes(state.masks), "extra": dict(extra or {})}
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(description))
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(step, args=items, metrics=None if score is None else {"score": float(score)}, force=True)
        except OSError as error:
            raise UsageError(f"checkpoint {str(self.folder)!r} cannot be written ({error.strerror})") from None

    def wait(self) -> None:
        """Wait until everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """Return what was saved beside the state of a step, the latest by default."""
        return self._description(self._step(step))["extra"]

    def restore(
        self,
        optimizer: optax.GradientTransformation,
        method: Method | None = None,
        sites: Sequence[Site] = (),
        *,
        step: int | None = None,
    ) -> TrainState:
        """Read a state back, bit for bit.

        Args:
          optimizer: the chain of the run.
          method: the method of the run.
          sites: what `init_state` got.
          step: the latest by default.

        Raises:
          UsageError: there is no such checkpoint, or optimizer or method are not those of the run; the message lists what
            differs.
        """
        import orbax.checkpoint as ocp

        step = self._step(step)
        description = self._description(step)
        adapters = {path: self._blank(path, of) for path, of in description["adapters"].items()}
        masks = {path: jnp.ones(shape, dtype) for path, (shape, dtype) in description["masks"].items()}
        like = init_state(jax.random.key(0), adapters, masks, optimizer, method, sites)
        wanted = _flat(like)
        saved = dict(self._manager.item_metadata(step).state)
        found = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in saved.items()}
        expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if wrong:
            first = wrong[0]
            raise UsageError(
                f"checkpoint {str(self.folder / str(step))!r} does not fit: {len(wrong)} leaves differ, first {first} (saved "
                f"{found.get(first, 'nothing')}, expected {expected.get(first, 'nothing')}); use the run's own optimizer "
                f"and method"
            )
        abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        restored = self._manager.restore(step, args=items).state
        leaves = [
            jax.random.wrap_key_data(restored[name], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else restored[name]
            for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    @property
    def _manager(self) -> Any:
        if self._opened is None:
            import orbax.checkpoint as ocp
            from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

            # Orbax reports on every step it takes; what a user must know is raised or returned.
            logging.getLogger("absl").setLevel(logging.ERROR)
            policy = keep.AnyPreservationPolicy(
                [keep.LatestN(self._keep), keep.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)]
            )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True, enable_background_delete=False
            )
            try:
                self._opened = ocp.CheckpointManager(
                    self.folder, options=options, item_names=("state", "description"),
                    item_handlers={"state": ocp.StandardCheckpointHandler(), "description": ocp.JsonCheckpointHandler()},
                )  # fmt: skip
            except OSError as error:
                raise UsageError(f"checkpoint {str(self.folder)!r} cannot be written ({error.strerror})") from None
        return self._opened

    def _step(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise UsageError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {str(self.folder)!r}; "
                + (f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none")
            )
        return steps[-1] if step is None else step

    def _description(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        return self._manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore())).description

    def _blank(self, path: str, of: Mapping[str, Any]) -> Any:
        if of["kind"] not in self._kinds:
            raise UsageError(
                f"checkpoint {str(self.folder)!r} has an adapter of kind {of['kind']!r} at {path!r}, which is not known here; "
                f"pass its class in kinds"
            )
        leaves = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in of["leaves"].items()}
        return self._kinds[of["kind"]](**leaves, **of["settings"])


def _describe(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Say of every adapter its kind, the shapes of its leaves and its settings."""
    described = {}
    for path, adapter in adapters.items():
        leaves = leaves_of(adapter)
        names = (field.name for field in dataclasses.fields(adapter) if field.name not in leaves)
        settings = {name: _plain(getattr(adapter, name)) for name in names}
        described[path] = {"kind": type(adapter).__name__, "leaves": _shapes(leaves), "settings": settings}
    return described


def _shapes(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in tree.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _flat(state: TrainState) -> dict[str, jax.Array]:
    # One flat dict: the file does not depend on the classes of the state. Typed keys are saved as their bits.
    named = zip(leaf_names(state), jax.tree.leaves(state), strict=True)
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
