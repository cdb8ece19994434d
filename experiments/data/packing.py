r"""Batches as a pure function of (seed, epoch, step), packed so that little is computed on padding.

A batch holds a constant number of examples, several of them in one row; `segment_ids` keep them apart. The row length
and a few row counts are fixed before the first step, because every shape is a compilation. They minimise

    sum over batches of  rows * length * (1 + length / 300)

exactly, over a large sample of batches, less any shape that would save under 2 %. The sample has its own seed, so that
every run on the same data has the same shapes and finds the others' compilations in the cache. The second factor is
attention, whose cost per token grows with the row. Packing is first-fit-decreasing: D. S. Johnson, 1973.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice

import numpy as np

from experiments.data.tokens import Encoded
from jaxprune.errors import UsageError

Batch = dict[str, np.ndarray]
Shape = tuple[int, int]

# Row length at which attention costs as much as everything else: it took 18 % of a MiniLM step at length 64.
_ATTENTION = 300
_MULTIPLE = 8  # row lengths, for aligned memory
_PREDICTED = 32  # places for predicted tokens in a row
_SAMPLE = 131072  # examples in the batches that decide the shapes, as in 4096 batches of 32
_WORTH = 0.02  # a further shape must save this much, or it does not earn its compilation
_SAMPLE_SEED = 0x5EED


class Batches:
    """Cut one encoded split into batches, for training or for evaluation.

    A batch is a dict of numpy arrays; R rows of length T hold the B = `batch_size` examples:

    - `input_ids`, `segment_ids`, `position_ids`, `token_type_ids`: int32 `(R, T)`. Segments count from 1 in each row
      and are 0 on padding; positions count from 0 in each example.
    - `first_tokens`: int32 `(B,)`, the index of each example's first token in the R * T flattened tokens.
    - `labels`: `(B, ...)`, int32 or, for regression, float32.
    - `weights`: float32 `(B,)`, 1 for an example and 0 for a filler in the last batch of an epoch, whose first token
      is 0.
    - `predicted`, where the examples say which of their tokens the model learns to predict: int32 `(R, S)`, where these
      stand in each row, and 0, a place that none of them has, behind the last. S is a multiple of 32 and the same in all
      batches, as no rows of these examples can need more.

    With `microbatches=k` every array has a leading axis k and B is `batch_size / k`. Fillers may make up a whole
    microbatch, so sum losses and weights over the k and divide once.

    Args:
        encoded: the examples.
        batch_size: examples a step.
        seed: order of the examples; None reads them for evaluation, in a fixed order and with a single shape
            (`restore` puts predictions back into the data's order).
        microbatches: parts that one batch is split into for gradient accumulation.
        max_shapes: bound on the number of distinct (R, T). The largest holds every batch of the sample; a batch that
            would need more (one in some thousands) exchanges its longest example for another batch's shortest.
        pack: False puts each example into a row of its own, for models that cannot take segments; R is then B and the
            T are the buckets.

    Raises:
        UsageError: a setting is out of range, or there is no example.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        seed: int | None,
        *,
        microbatches: int = 1,
        max_shapes: int = 3,
        pack: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("microbatches", microbatches), ("max_shapes", max_shapes)):
            if value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if batch_size % microbatches:
            raise UsageError(f"batch_size {batch_size} cannot be split into {microbatches} equal microbatches")
        if not len(encoded):
            raise UsageError("cannot make batches of no examples; expected at least one")
        if seed is not None and seed < 0:
            raise UsageError(f"seed is {seed}; expected a non-negative integer")
        self._encoded, self._lengths = encoded, np.diff(encoded.offsets)
        self.batch_size, self.microbatches, self.pack, self.seed = batch_size, microbatches, pack, seed
        self.steps_per_epoch = -(-len(encoded) // batch_size)
        self._last_order: tuple[int, np.ndarray] | None = None
        if seed is None:
            # No more examples can come: the shape need only hold these batches.
            self._fixed = deal(self._lengths, self.steps_per_epoch, batch_size)
            self.shapes = _choose_shapes(self._parts(self._fixed), self._lengths, 1, pack)
        else:
            self.shapes = _choose_shapes(self._parts(self._sample()), self._lengths, max_shapes, pack)

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Return which examples `batch` holds, in its order; -1 stands for a filler."""
        if not 0 <= step < self.steps_per_epoch or epoch < 0:
            raise IndexError(f"no batch {step} in epoch {epoch}; an epoch has {self.steps_per_epoch} steps")
        return self._split(self._order(epoch)[step]).reshape(-1)

    def shape(self, epoch: int, step: int) -> Shape:
        """Return the shape of the batch of one step."""
        return self._holding(int(self._levels(self._order(epoch)[step : step + 1])[0]))

    def batch(self, epoch: int, step: int, shape: Shape | None = None) -> Batch:
        """Build the batch of one step: a pure function of the data, the settings, the seed, `epoch` and `step`.

        A larger one of `shapes` than the batch needs adds padding alone.
        """
        parts = self.indices(epoch, step).reshape(self.microbatches, -1)
        placed = [self._place(part) for part in parts]
        shape = shape or self._holding(max(level for _, level in placed))
        filled = [self._fill(part, where, shape) for part, (where, _) in zip(parts, placed, strict=True)]
        if self.microbatches == 1:
            return filled[0]
        return {key: np.stack([part[key] for part in filled]) for key in filled[0]}

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from step `start` on, built two ahead in a thread."""
        steps = iter(range(start, self.steps_per_epoch))
        with ThreadPoolExecutor(1, "batches") as pool:
            ahead = deque(pool.submit(self.batch, epoch, step) for step in islice(steps, 2))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.batch, epoch, step) for step in islice(steps, 1))
                yield batch

    def reseeded(self, seed: int) -> Batches:
        """Return the same for another order of the examples; shapes do not depend on it."""
        other = copy.copy(self)
        other.seed, other._last_order = seed, None
        other.__dict__.pop("tokens_per_real_token", None)
        return other

    def all(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch as they are asked for."""
        return (self.batch(epoch, step) for step in range(self.steps_per_epoch))

    def restore(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Put the outputs of all batches of an epoch, each `(batch_size, ...)`, into the order of the data.

        Only for evaluation (`seed=None`); fillers are dropped.
        """
        if self.seed is not None or len(outputs) != self.steps_per_epoch:
            raise ValueError(f"expected the outputs of {self.steps_per_epoch} evaluation batches, got {len(outputs)}")
        flat = np.concatenate([np.asarray(x) for x in outputs])
        order = np.concatenate([self.indices(0, step) for step in range(self.steps_per_epoch)])
        restored = np.empty((len(self._encoded), *flat.shape[1:]), flat.dtype)
        restored[order[order >= 0]] = flat[order >= 0]
        return restored

    @cached_property
    def tokens_per_real_token(self) -> float:
        """Return computed tokens per token of text over the first epoch: 1 would be no padding at all."""
        edges = [shape[self._side] for shape in self.shapes]
        sizes = np.array([rows * length for rows, length in self.shapes])
        computed = sizes[np.searchsorted(edges, self._levels(self._order(0)))].sum() * self.microbatches
        return float(computed / self._lengths.sum())

    @cached_property
    def room(self) -> int:
        """Return S, the places for predicted tokens in a row."""
        return _room(self._lengths, _predicted(self._encoded), self.shapes[-1][1] if self.pack else None)

    @property
    def _side(self) -> int:
        """Return which number of a shape varies: the rows when packed, else the length."""
        return 0 if self.pack else 1

    def _holding(self, level: int) -> Shape:
        """Return the smallest shape that holds so many rows, or such a length."""
        return next(shape for shape in self.shapes if shape[self._side] >= level)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the examples of an epoch, `(steps, batch_size)`, padded with -1."""
        if self.seed is None:
            return self._fixed
        last = self._last_order
        if last is None or last[0] != epoch:
            rng = np.random.Generator(np.random.PCG64((self.seed, epoch)))
            last = self._last_order = (epoch, self._fit(self._cut(rng.permutation(len(self._encoded))), rng))
        return last[1]

    def _fit(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Exchange examples until every batch fits the largest shape."""
        top, lengths = self.shapes[-1][self._side], np.append(self._lengths, 0)  # index -1: a filler
        levels = self._levels(order)
        for _ in range(order.size):
            full = int(levels.argmax())
            if levels[full] <= top:
                return order
            spare = int(lengths[order].sum(1).argmin())
            shortest = np.where(order[spare] < 0, lengths.max() + 1, lengths[order[spare]]).argmin()
            longest = lengths[order[full]].argmax()
            order[full, longest], order[spare, shortest] = order[spare, shortest], order[full, longest]
            levels[[full, spare]] = self._levels(order[[full, spare]])
        # Hardly ever: the balanced batches of `deal` fit, as `_sample` has them.
        return rng.permutation(deal(self._lengths, self.steps_per_epoch, self.batch_size))

    def _levels(self, batches: np.ndarray) -> np.ndarray:
        """Return the rows (packed) or the length that each batch needs."""
        return _levels(self._parts(batches), self.shapes[0][1] if self.pack else None)

    def _sample(self) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(_SAMPLE_SEED))
        count = min(4096, max(128, _SAMPLE // self.batch_size))
        epochs = -(-count // self.steps_per_epoch)
        orders = [self._cut(rng.permutation(len(self._encoded))) for _ in range(epochs)]
        balanced = deal(self._lengths, self.steps_per_epoch, self.batch_size)
        return np.concatenate([np.concatenate(orders)[:count], balanced])

    def _cut(self, order: np.ndarray) -> np.ndarray:
        padded = np.full(self.steps_per_epoch * self.batch_size, -1)
        padded[: len(order)] = order
        return padded.reshape(-1, self.batch_size)

    def _split(self, batches: np.ndarray) -> np.ndarray:
        """Split batches `(..., batch_size)` into microbatches `(..., k, batch_size / k)` of about equal length."""
        if self.microbatches == 1:
            return batches[..., None, :]
        lengths = np.where(batches < 0, 0, self._lengths[batches])
        ranks = np.argsort(-lengths, axis=-1, kind="stable")
        dealt = np.take_along_axis(batches, ranks, -1).reshape(*batches.shape[:-1], -1, self.microbatches).copy()
        dealt[..., 1::2, :] = dealt[..., 1::2, ::-1]  # to and fro, so that no microbatch gets all the longer ones
        return np.swapaxes(dealt, -1, -2)

    def _parts(self, batches: np.ndarray) -> np.ndarray:
        """Return the lengths `(batches, k, batch_size / k)` of the examples, 0 for fillers."""
        parts = self._split(batches)
        return np.where(parts < 0, 0, self._lengths[parts])

    def _place(self, part: np.ndarray) -> tuple[list[tuple[int, int, int, int]], int]:
        """Return (position in the part, row, column, segment) of each example, and the rows or the length needed."""
        real = np.flatnonzero(part >= 0)
        sizes = self._lengths[part[real]]
        if not self.pack:
            return [(int(i), int(i), 0, 1) for i in real], int(sizes.max(initial=1))
        length = self.shapes[0][1]
        used: list[int] = []  # tokens in each row
        segments: list[int] = []  # examples in each row
        where = []
        order = np.argsort(-sizes, kind="stable")
        for i, size in zip(real[order].tolist(), sizes[order].tolist(), strict=True):
            row = next((row for row, taken in enumerate(used) if taken + size <= length), len(used))
            if row == len(used):
                used.append(0)
                segments.append(0)
            segments[row] += 1
            where.append((i, row, used[row], segments[row]))
            used[row] += size
        return where, len(used)

    def _fill(self, part: np.ndarray, where: list[tuple[int, int, int, int]], shape: Shape) -> Batch:
        batch = _empty(shape, len(part), self._encoded.labels)
        for i, row, column, segment in where:
            _write(batch, self._encoded, int(part[i]), i, row, column, segment)
        return _marked(batch, self.room) if self._encoded.predicts else batch


def evaluation_batches(splits: Mapping[str, Encoded], batch_size: int, *, pack: bool = True) -> dict[str, Batches]:
    """Make evaluation batches of several splits that all have the same shape, so that one compilation serves them.

    Args:
        splits: name -> examples.
        batch_size: examples a step.
        pack: as in `Batches`.

    Returns:
        name -> batches, in a fixed order.
    """
    made = {name: Batches(encoded, batch_size, None, pack=pack) for name, encoded in splits.items()}
    parts = np.concatenate([batches._parts(batches._fixed) for batches in made.values()])
    lengths = np.concatenate([batches._lengths for batches in made.values()])
    for batches in made.values():
        batches.shapes = _choose_shapes(parts, lengths, 1, pack)
    room = max(batches.room for batches in made.values())
    for batches in made.values():
        batches.room = room
    return made


def single_example_batches(encoded: Encoded, n: int) -> Batch:
    """Stack the first `n` examples as batches of one, for gradients per example.

    Args:
        encoded: the examples.
        n: how many; fewer if there are fewer.

    Returns:
        a batch with leading axis n: tokens `(n, 1, T)`, `labels`, `weights` and `first_tokens` `(n, 1)`, `predicted`
        `(n, 1, S)` where there is any.
    """
    n = min(n, len(encoded))
    if n < 1:
        raise UsageError(f"cannot take {n} examples; expected at least one")
    length = _round_up(int(np.diff(encoded.offsets[: n + 1]).max()))
    batch = _empty((n, length), n, encoded.labels)
    for i in range(n):
        _write(batch, encoded, i, i, i, 0, 1)
    batch["first_tokens"][:] = 0
    if encoded.predicts:
        batch = _marked(batch, _room(np.diff(encoded.offsets), _predicted(encoded)[:n], None))
    return {key: x[:, None] for key, x in batch.items()}


def deal(lengths: np.ndarray, hands: int, size: int) -> np.ndarray:
    """Deal examples, the longest first and to and fro, so that all hands hold about as many tokens.

    Args:
        lengths: `(n,)` in tokens, `n <= hands * size`.
        hands: number of batches.
        size: examples a batch.

    Returns:
        indices `(hands, size)`; -1 where a hand has no further example, always behind the real ones.
    """
    cards = np.full(hands * size, -1)
    cards[: len(lengths)] = np.argsort(-lengths, kind="stable")
    rounds = cards.reshape(size, hands)
    rounds[1::2] = rounds[1::2, ::-1]
    return np.ascontiguousarray(rounds.T)


def _choose_shapes(parts: np.ndarray, lengths: np.ndarray, max_shapes: int, pack: bool) -> list[Shape]:
    """Return the cheapest shapes for the sampled `parts` `(batches, k, examples)` of data with `lengths`."""
    first, examples = _round_up(int(lengths.max())), parts.shape[-1]
    if not pack:
        levels = np.append(_round_up(_levels(parts, None)), first)  # the longest example may not be in the sample
        return [(examples, width) for width in _cover(levels, max_shapes, lambda t: t * (1 + t / _ATTENTION))[0]]
    best: tuple[float, list[Shape]] = (np.inf, [])
    tokens = parts.sum(-1).max(1).mean()
    for length in range(first, max(first, min(4 * first, 512)) + 1, _MULTIPLE):
        per_token = 1 + length / _ATTENTION
        if tokens * per_token >= best[0]:
            break  # even without padding such long rows would cost more
        chosen, cost = _cover(_levels(parts, length), max_shapes, lambda rows, t=length * per_token: rows * t)
        if cost < best[0]:
            best = cost, [(rows, length) for rows in chosen]
    return best[1]


def _cover(levels: np.ndarray, k: int, cost: Callable[[int], float]) -> tuple[list[int], float]:
    r"""Choose at most k levels with the least mean cost when each batch takes the next chosen one up.

    Dynamic programme over the distinct levels L_1 < ... < L_m, with N_i batches at or below L_i:
    best_k(i) = min over j < i of best_{k-1}(j) + cost(L_i) * (N_i - N_j). Exact.
    """
    values, counts = np.unique(levels, return_counts=True)
    below = np.append(0, np.cumsum(counts))
    price = np.array([cost(int(v)) for v in values])
    m = len(values)
    best = np.full(m + 1, np.inf)
    best[0] = 0.0
    back, costs = [], []
    for _ in range(min(k, m)):
        # option[i, j]: the next level up to cover batches j+1..i is L_i
        option = best[None, :] + price[:, None] * (below[1:, None] - below[None, :])
        option[np.arange(m + 1)[None, :] > np.arange(m)[:, None]] = np.inf
        back.append(option.argmin(1))
        best = np.append(np.inf, option.min(1))
        costs.append(best[m])
    count = next(i for i, c in enumerate(costs) if c <= min(costs) * (1 + _WORTH)) + 1
    chosen, i = [], m
    for step in reversed(range(count)):
        chosen.append(int(values[i - 1]))
        i = int(back[step][i - 1])
    return chosen[::-1], float(costs[count - 1] / len(levels))


def _levels(parts: np.ndarray, length: int | None) -> np.ndarray:
    """Return what each batch needs (its worst microbatch), all batches at once.

    Args:
        parts: lengths `(batches, k, examples)`, 0 for fillers.
        length: row length, to count the rows that first-fit-decreasing needs; None for the longest example.
    """
    if length is None:
        return parts.max(axis=(1, 2))
    examples = parts.shape[-1]
    lengths = -np.sort(-parts.reshape(-1, examples), axis=1)
    free = np.full(lengths.shape, length, np.int32)
    every = np.arange(len(lengths))
    width = 1  # rows in use in the worst batch so far, and one to spare
    for i in range(examples):
        row = (free[:, :width] >= lengths[:, i, None]).argmax(1)
        free[every, row] -= lengths[:, i]
        width = min(examples, max(width, int(row.max()) + 2))
    return (free < length).sum(1).reshape(parts.shape[:2]).max(1)


def _round_up(length, multiple=_MULTIPLE):
    return -(-length // multiple) * multiple


def _predicted(encoded: Encoded) -> np.ndarray:
    """Return how many tokens of each example are predicted."""
    return np.add.reduceat(encoded.type_ids, encoded.offsets[:-1], dtype=np.int64)


def _room(lengths: np.ndarray, predicted: np.ndarray, length: int | None) -> int:
    """Return the most predicted tokens that a row of `length` tokens can hold, rounded up; None for one example a row.

    A knapsack, exact: best(c) = max over examples of predicted_i + best(c - length_i). Of examples of one length no more than
    fit into a row side by side can matter, those that predict most.
    """
    if length is None:
        return _round_up(int(predicted.max()), _PREDICTED)
    best = np.zeros(length + 1, np.int64)
    for size in np.unique(lengths).tolist():
        for gain in np.sort(predicted[lengths == size])[::-1][: length // size].tolist():
            best[size:] = np.maximum(best[size:], best[: length + 1 - size] + gain)
    return _round_up(int(best[-1]), _PREDICTED)


def _marked(batch: Batch, room: int) -> Batch:
    """Add where the predicted tokens stand in each row."""
    rows, columns = np.nonzero(batch["token_type_ids"])
    before = np.searchsorted(rows, rows)  # as `nonzero` goes row by row
    predicted = np.zeros((len(batch["input_ids"]), room), np.int32)
    predicted[rows, np.arange(len(rows)) - before] = columns
    return {**batch, "predicted": predicted}


def _empty(shape: Shape, examples: int, labels: np.ndarray) -> Batch:
    batch: Batch = {
        key: np.zeros(shape, np.int32) for key in ("input_ids", "segment_ids", "position_ids", "token_type_ids")
    }
    batch["first_tokens"] = np.zeros(examples, np.int32)
    batch["labels"] = np.zeros((examples, *labels.shape[1:]), labels.dtype)
    batch["weights"] = np.zeros(examples, np.float32)
    return batch


def _write(batch: Batch, encoded: Encoded, example: int, i: int, row: int, column: int, segment: int) -> None:
    """Write one example into a batch."""
    start, stop = encoded.offsets[example], encoded.offsets[example + 1]
    place = slice(column, column + int(stop - start))
    batch["input_ids"][row, place] = encoded.ids[start:stop]
    batch["token_type_ids"][row, place] = encoded.type_ids[start:stop]
    batch["segment_ids"][row, place] = segment
    batch["position_ids"][row, place] = np.arange(stop - start)
    batch["first_tokens"][i] = row * batch["input_ids"].shape[1] + column
    batch["labels"][i] = encoded.labels[example]
    batch["weights"][i] = 1.0
