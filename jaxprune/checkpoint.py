"""Checkpoints of a run: the whole state written by Orbax, and a description from which its shapes are rebuilt.

Pruning changes shapes while a run goes, so a checkpoint says itself what it holds: adapters, masks and everything made from them
are rebuilt from its description, then filled. Writing happens in the background, aside and renamed: a checkpoint is whole or
not there, whenever the process dies.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import adapters as kinds_of_adapters
from jaxprune import checkpoint_files as files
from jaxprune.adapters.base import leaves_of
from jaxprune.checks import Range, whole
from jaxprune.errors import UsageError, shown
from jaxprune.methods.base import Method
from jaxprune.train import TrainState, init_state, leaf_names, place

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one folder; use it in a `with` statement, whose end waits for the last one to be written.

    Whatever else lies in the folder is left alone: never read as a checkpoint, never deleted.

    Args:
      folder: made when the first checkpoint is saved.
      keep: how many of the latest are kept; the one with the best score is kept besides.
      kinds: your own kinds of adapters, where a run has any; jaxprune's are known.

    Raises:
      UsageError: `keep` is no number of checkpoints, or `folder` cannot be a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, kinds: Sequence[type] = ()) -> None:
        self._keep = whole("keep", keep, Range(1))
        self.folder = _folder(folder)
        known = [kind for kind in vars(kinds_of_adapters).values() if isinstance(kind, type)]
        self._kinds: dict[str, type] = {kind.__name__: kind for kind in (*known, *kinds)}
        # What the checks of this object found: the descriptions of whole checkpoints, and what is wrong with others.
        self._whole: dict[int, dict[str, Any]] = {}
        self._damaged: dict[int, str] = {}
        self._writing: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.wait()
        except UsageError as error:
            if kind is None:
                raise
            _log.warning("%s", error)  # the exception under way says more

    def steps(self) -> list[int]:
        """List the steps with a checkpoint, the latest last; those found to be damaged are left out."""
        self.wait()
        return self._steps()

    def latest(self) -> int | None:
        """Return the step of the latest whole checkpoint, None where there is none at all; every byte of it is checked.

        Later ones that are damaged are passed over, with one line to say so.

        Raises:
          UsageError: there are checkpoints, but none is whole.
        """
        self.wait()
        passed: dict[int, str] = {}
        numbered = self._numbered()
        for step in reversed(numbered):
            new = step not in self._damaged
            try:
                self._check(step)
            except files.Damaged as error:
                passed |= {step: str(error)} if new else {}
                continue
            if passed:
                _log.warning("%s; step %d is used instead", self._bad(passed), step)
            return step
        if numbered:
            raise UsageError(
                f"{self._bad({step: self._damaged[step] for step in reversed(numbered)})}, and there is no whole one; move "
                f"what is damaged away to begin anew, or choose another folder"
            )
        return None

    def save(
        self,
        state: TrainState,
        extra: Mapping[str, Any] | None = None,
        *,
        method: Method | None = None,
        score: float | None = None,
    ) -> None:
        """Save a state under its step, in the background; what was saved under that step before is replaced.

        Args:
          state: may be donated to the next step at once.
          extra: what else to remember, anything JSON can hold.
          method: the method of the run, whose name `restore` compares.
          score: larger is better; decides which checkpoint is the best. NaN is none.

        Raises:
          UsageError: the folder cannot be written, or the disk is full; this save, or the one before, which is found out
            here, in `wait` or at the end of the `with` statement. Or an argument is none of the above.
        """
        self.wait()
        step = _step_of(state)
        # Copies, because the next step may overwrite the buffers before they are written.
        arrays = {name: jnp.copy(leaf) for name, leaf in _flat(state).items()}
        saved = {
            "step": step, "score": _score(score), "method": method.name if method else "",
            "key": str(jax.random.key_impl(state.key)) if _is_key(state.key) else None,
            "adapters": _describe(state.adapters), "weights": _shapes(state.weights), "masks": _shapes(state.masks),
            "leaves": _shapes(arrays),
            "extra": {} if extra is None else extra,
        }  # fmt: skip
        try:
            if not isinstance(saved["extra"], Mapping):
                raise TypeError(f"it is of type {type(extra).__name__}")
            saved = json.loads(json.dumps({**saved, "extra": dict(saved["extra"])}))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"extra cannot be saved ({error}); expected a mapping that JSON can hold") from None
        temporary = self.folder / f"{step}{files.UNFINISHED}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"[0-9]*{files.UNFINISHED}"):
                files.delete(left)
            temporary.mkdir()
        except OSError as error:
            raise self._refused(step, error.errno) from None
        worker = concurrent.futures.ThreadPoolExecutor(1)
        self._writing = worker.submit(self._write, temporary, saved, arrays)
        worker.shutdown(wait=False)
        atexit.register(self._forgotten)

    def wait(self) -> None:
        """Wait until everything saved so far is on disk.

        Raises:
          UsageError: it could not be written; nothing of it is left behind.
        """
        if self._writing is not None:
            concurrent.futures.wait([self._writing])  # may be interrupted, and called again
            atexit.unregister(self._forgotten)
            writing, self._writing = self._writing, None
            writing.result()

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """Return what was saved beside the state of a step; by default that of `latest`, as `restore` does."""
        return self._asked(step)["extra"]

    def restore(
        self,
        optimizer: optax.GradientTransformation,
        method: Method | None = None,
        *,
        step: int | None = None,
        where: TrainState | None = None,
    ) -> TrainState:
        """Read a state back, bit for bit.

        Args:
          optimizer: the chain of the run.
          method: the method of the run.
          step: by default that of `latest`; a step that is named is never replaced by another.
          where: a state on the devices where this one is to lie, such as what `init_state` made of the run's first adapters;
            None for the one device that JAX uses by default.

        Raises:
          UsageError: there is no such checkpoint, it is damaged, or optimizer or method are not those of the run; the
            message lists what differs.
        """
        saved = self._asked(step)
        path = self.folder / str(saved["step"])
        if method and method.name and saved["method"] and method.name != saved["method"]:
            raise UsageError(
                f"checkpoint {str(path)!r} was saved by method {saved['method']!r}, not {method.name!r}; use the run's own "
                f"method"
            )
        adapters = {site: self._blank(site, of) for site, of in saved["adapters"].items()}
        masks = {site: jnp.ones(shape, dtype) for site, (shape, dtype) in saved["masks"].items()}
        weights = {leaf: jnp.zeros(shape, dtype) for leaf, (shape, dtype) in saved["weights"].items()}
        key = jax.random.PRNGKey(0) if saved["key"] is None else jax.random.key(0, impl=saved["key"])
        like = init_state(key, adapters, masks, optimizer, method, weights=weights)
        found, expected = saved["leaves"], _shapes(_flat(like))
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if wrong:
            first = wrong[0]
            raise UsageError(
                f"checkpoint {str(path)!r} does not fit: {len(wrong)} leaves differ, first {first} (saved "
                f"{found.get(first, 'nothing')}, expected {expected.get(first, 'nothing')}); use the run's own optimizer "
                f"and method"
            )
        arrays = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in found.items() if 0 in shape}
        arrays |= {name: jnp.array(value) for name, value in files.read(path).items()}
        leaves = [
            jax.random.wrap_key_data(arrays[name], impl=jax.random.key_impl(leaf)) if _is_key(leaf) else arrays[name]
            for name, leaf in zip(leaf_names(like), jax.tree.leaves(like), strict=True)
        ]
        return place(jax.tree.unflatten(jax.tree.structure(like), leaves), like if where is None else where)

    def _forgotten(self) -> None:
        """Wait at the end of a program that did not, where it is often too late for Orbax to finish."""
        try:
            self.wait()
        except Exception as error:
            _log.warning(
                "a checkpoint in %r is lost (%s); call wait, or use a `with` statement", str(self.folder), error
            )

    def _numbered(self) -> list[int]:
        """List the numbers that folders are named after, checkpoints or not."""
        try:
            found = [path.name for path in self.folder.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"folder {str(self.folder)!r} cannot be read ({error.strerror})") from None
        return sorted(int(name) for name in found if re.fullmatch("0|[1-9][0-9]*", name))

    def _described(self) -> dict[int, dict[str, Any]]:
        """Map the steps with a checkpoint to their descriptions, without those found to be damaged."""
        described = {}
        for step in self._numbered():
            if step not in self._damaged:
                try:
                    described[step] = files.description(self.folder / str(step))
                except files.Damaged:
                    continue  # `latest` says so; here it is just no checkpoint
        return described

    def _steps(self) -> list[int]:
        return list(self._described())

    def _check(self, step: int) -> dict[str, Any]:
        """Return the description of a checkpoint after checking every file of it, once."""
        if step in self._damaged:
            raise files.Damaged(self._damaged[step])
        if step not in self._whole:
            try:
                self._whole[step] = files.checked(self.folder / str(step))
            except files.Damaged as error:
                self._damaged[step] = str(error)
                raise
        return self._whole[step]

    def _asked(self, step: int | None) -> dict[str, Any]:
        """Return the description of the checkpoint of a step, by default the latest whole one."""
        if step is None:
            latest = self.latest()
            if latest is None:
                raise UsageError(f"no checkpoint in {str(self.folder)!r}; it has none")
            return self._check(latest)
        self.wait()
        step = whole("step", step, Range(0))
        try:
            if step in self._numbered():
                return self._check(step)
            wrong = f"no checkpoint of step {shown(step)} in {str(self.folder)!r}"
        except files.Damaged as error:
            wrong = self._bad({step: str(error)})
        steps = self._steps()
        raise UsageError(f"{wrong}; it has {f'those of steps {_list(steps)}' if steps else 'none'}")

    def _bad(self, damaged: Mapping[int, str]) -> str:
        step, reason = next(iter(damaged.items()))
        others = [other for other in damaged if other != step]
        return (
            f"checkpoint {str(self.folder / str(step))!r} is not whole ({reason})"
            + (f", and so {'are those of steps' if others[1:] else 'is that of step'} {_list(others)}" if others else "")
        )  # fmt: skip

    def _write(self, temporary: Path, saved: dict[str, Any], arrays: Mapping[str, jax.Array]) -> None:
        """Write a checkpoint, give it its name, and delete what need not be kept."""
        step, path = saved["step"], self.folder / str(saved["step"])
        try:
            files.write(temporary, saved, arrays)
            replaced = self._move_away(path)
            temporary.rename(path)
            self._damaged.pop(step, None)
            self._whole.pop(step, None)
            if replaced:
                files.delete(replaced)
            self._thin(step)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            number = files.errno_of(error)
            if number is None:
                raise
            raise self._refused(step, number) from None

    def _move_away(self, path: Path) -> Path | None:
        """Free the name of a checkpoint; return what the old one is called until it is deleted."""
        if not os.path.lexists(path):
            return None
        try:
            files.description(path)
        except files.Damaged as error:
            # Perhaps not ours to delete.
            aside, count = path.with_name(f"{path.name}.aside"), 1
            while os.path.lexists(aside):
                count += 1
                aside = path.with_name(f"{path.name}.aside-{count}")
            path.rename(aside)
            _log.warning("%r was no whole checkpoint (%s) and is now %r", str(path), error, str(aside))
            return None
        return path.rename(path.with_name(f"{path.name}.old{files.UNFINISHED}"))

    def _thin(self, step: int) -> None:
        """Delete all but the latest, the best and the one just saved."""
        described = self._described()
        scored = [(of["score"], number) for number, of in described.items() if of["score"] is not None]
        kept = {step, *sorted(described)[-self._keep :], *(number for _, number in sorted(scored)[-1:])}
        for number in described.keys() - kept:
            path = self.folder / str(number)
            # Out of the list first: a process that dies meanwhile leaves no half of it there.
            files.delete(path.rename(path.with_name(f"{number}.old{files.UNFINISHED}")))
            self._whole.pop(number, None)

    def _refused(self, step: int, number: int | None) -> UsageError:
        steps = self._steps() if self.folder.is_dir() else []
        full = number in (errno.ENOSPC, errno.EDQUOT)
        return UsageError(
            f"checkpoint {str(self.folder / str(step))!r} cannot be written ({os.strerror(number or 0)}); "
            f"{'free some space or ' if full else ''}choose another folder; "
            + (f"the latest whole one is of step {steps[-1]}" if steps else "there is no whole one yet")
        )

    def _blank(self, path: str, of: Mapping[str, Any]) -> Any:
        if of["kind"] not in self._kinds:
            raise UsageError(
                f"checkpoint {str(self.folder)!r} has an adapter of kind {of['kind']!r} at {path!r}, which is not known here; "
                f"pass its class in kinds"
            )
        leaves = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in of["leaves"].items()}
        try:
            return self._kinds[of["kind"]](**leaves, **of["settings"])
        except TypeError:
            fields = ", ".join((*leaves, *of["settings"]))
            raise UsageError(
                f"checkpoint {str(self.folder)!r} has an adapter of kind {of['kind']!r} at {path!r} with other fields "
                f"({fields}) than the class given in kinds; pass the run's own"
            ) from None


def _folder(folder: str | os.PathLike[str]) -> Path:
    try:
        path = os.fspath(folder)
        if not isinstance(path, str) or not path:
            raise TypeError("it is no path")
        if not os.path.isdir(path) and os.path.lexists(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.stat(path)
    except FileNotFoundError:
        pass  # it is made when the first checkpoint is saved
    except (TypeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"folder {shown(folder)} cannot hold checkpoints ({reason}); choose another") from None
    return Path(path).absolute()


def _score(score: Any) -> float | None:
    try:
        value = math.nan if score is None else float(score)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"score {shown(score)} cannot be used; expected a number, or None") from None
    return None if math.isnan(value) else value


def _step_of(state: Any) -> int:
    if not isinstance(state, TrainState):
        raise UsageError(f"a state of type {type(state).__name__} cannot be saved; expected a TrainState")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        raise UsageError("the state was donated to a step and is gone; save the state that the step returned")
    if jnp.shape(state.step):
        raise UsageError(
            f"a state whose step has shape {jnp.shape(state.step)} cannot be saved; save one run at a time"
        )
    return whole("the state's step", np.asarray(state.step)[()], Range(0))


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if steps[8:] else "")


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
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
