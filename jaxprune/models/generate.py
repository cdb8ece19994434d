"""Text token by token: greedy, sampled, or by beam search, with a cache of keys and values.

Prompts are padded on the left, so that the next token of all rows has one slot. Sampling draws from

    softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the fewest whose probabilities reach `top_p`,

with a key of its own for every row, so that an answer does not depend on its neighbours. Beam search keeps the K best unfinished
beginnings; what ends among the K best of a step is finished with the score log p / n^length_penalty, n its tokens with the stop,
and the search ends where no beginning can beat the worst of K finished ones (the default rules of `transformers`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UsageError, shown
from jaxprune.inputs import real, whole
from jaxprune.models.decoder import Cache, empty_cache
from jaxprune.models.decoder_config import DecoderConfig

_MULTIPLE = 32  # prompts are padded to it, so that few shapes are compiled
_NEVER = -1.0e9  # a score that no real one reaches


class Settings(NamedTuple):
    """How answers are written.

    Attributes:
      max_tokens: most tokens of an answer.
      stops: ids that end one.
      temperature: 0 takes the likeliest token.
      top_k: draw from so many tokens; 0 for all.
      top_p: draw from the fewest tokens with so much probability.
      beams: beginnings that a beam search keeps; 1 for none.
      length_penalty: of the beam search; above 0 long answers gain.
      seed: of what is drawn.
    """

    max_tokens: int = 256
    stops: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0

    def check(self) -> Settings:
        """Refuse a value out of its range.

        Raises:
          UsageError: there is one.
        """
        for name, least in (("max_tokens", 1), ("top_k", 0), ("beams", 1), ("seed", 0)):
            if (number := whole(getattr(self, name))) is None or number < least:
                raise UsageError(f"{name} is {shown(getattr(self, name))}; expected a whole number, {least} or more")
        for name, holds, expected in (
            ("temperature", lambda x: x >= 0, "a number, 0 or more"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1"),
            ("length_penalty", lambda x: True, "a number"),
        ):
            if (number := real(getattr(self, name))) is None or not holds(number):
                raise UsageError(f"{name} is {shown(getattr(self, name))}; expected {expected}")
        if self.beams > 1 and self.temperature:
            raise UsageError(
                f"beams {self.beams} and temperature {self.temperature}: a beam search draws nothing; give one"
            )
        return self


class Answer(NamedTuple):
    """Tokens of an answer without the one that ended it, and whether one did."""

    tokens: list[int]
    stopped: bool


class _State(NamedTuple):
    """An unfinished batch: `tokens` (B, max_tokens), of which `count` are there."""

    cache: Cache
    logits: jax.Array
    tokens: jax.Array
    count: jax.Array
    done: jax.Array
    position: jax.Array


class _Beams(NamedTuple):
    """An unfinished beam search: P prompts, K beams."""

    cache: Cache
    logits: jax.Array  # (P * K, V)
    tokens: jax.Array  # (P, K, max_tokens) of the running beams
    scores: jax.Array  # (P, K)
    ended: jax.Array  # (P, K, max_tokens) of the finished ones, best first
    lengths: jax.Array  # (P, K)
    ended_scores: jax.Array  # (P, K)
    open: jax.Array  # (P,)
    count: jax.Array
    going: jax.Array
    position: jax.Array  # (P * K,)


class Generator:
    """Write answers with a decoder; programs are compiled once for each shape.

        Generator(jp.attach(model), config, params, adapters, masks)(prompts, Settings(max_tokens=100, stops=(2,)))

    Args:
      forward: `forward(*state, input_ids, segment_ids, position_ids, scored=..., cache=...)`, as `Decoder` has it.
      config: the decoder's.
      state: what `forward` takes first.
    """

    def __init__(self, forward: Callable[..., Any], config: DecoderConfig, *state: Any) -> None:
        self._config, self._state = config, state

        def model(state, ids, segments, positions, cache):
            last = jnp.full((ids.shape[0], 1), ids.shape[1] - 1)
            logits, cache = forward(*state, ids, segments, positions, scored=last, cache=cache)
            return logits[:, 0], cache

        self._prefill = jax.jit(functools.partial(_prefill, model, config), static_argnames=("slots", "copies"))
        self._advance = jax.jit(
            functools.partial(_advance, model), static_argnames=("stops", "drawing"), donate_argnums=(1,)
        )
        self._search = jax.jit(functools.partial(_search, model), static_argnames=("stops", "beams"))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Settings | Sequence[Settings] = Settings(),  # noqa: B008
        *,
        batch: int = 8,
        every: int = 16,
        told: Callable[[Mapping[int, list[int]]], None] = lambda new: None,
    ) -> list[Answer]:
        """Answer every prompt.

        Args:
          prompts: token ids, each with one or more.
          settings: for all prompts, or one for each; `max_tokens`, `stops` and `beams` must then be the same.
          batch: prompts that are answered together.
          every: tokens between two calls of `told`.
          told: called with {prompt: its new tokens} while answers grow; not in a beam search.

        Raises:
          UsageError: a prompt is empty, or is too long for the model together with its answer, or a setting is out of range.
        """
        each = [settings] * len(prompts) if isinstance(settings, Settings) else list(settings)
        if len(each) != len(prompts):
            raise UsageError(f"{len(each)} settings for {len(prompts)} prompts; give one for each, or one for all")
        for one in each:
            one.check()
        if not prompts:
            return []
        first = each[0]
        if any((s.max_tokens, s.stops, s.beams) != (first.max_tokens, first.stops, first.beams) for s in each):
            raise UsageError("prompts that are answered together need the same max_tokens, stops and beams")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise UsageError(f"prompt {i} has no tokens; expected one or more")
            if len(prompt) + first.max_tokens > self._config.max_length:
                raise UsageError(
                    f"prompt {i} has {len(prompt)} tokens, and with {first.max_tokens} of the answer that is more than the "
                    f"{self._config.max_length} positions of the model; shorten it, or lower max_tokens"
                )
        answers: dict[int, Answer] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            # A last batch that is not full answers its first prompt several times: one program serves all.
            filled = rows + [rows[0]] * (min(batch, len(prompts)) - len(rows))
            write = self._beam if first.beams > 1 else self._plain
            found = write([prompts[i] for i in filled], [each[i] for i in filled], rows, every, told)
            answers.update(zip(rows, found, strict=False))
        return [answers[i] for i in range(len(prompts))]

    def _start(
        self, prompts: Sequence[Sequence[int]], most: int, copies: int = 1
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """Compute the prompts: (cache, logits of the next token, its position), each row `copies` times."""
        length = -(-max(map(len, prompts)) // _MULTIPLE) * _MULTIPLE
        ids, segments = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :], segments[row, length - len(prompt) :] = prompt, 1
        return self._prefill(self._state, ids, segments, slots=length + most, copies=copies)

    def _plain(self, prompts, settings, rows, every, told) -> list[Answer]:
        one = settings[0]
        cache, logits, position = self._start(prompts, one.max_tokens)
        drawing = any(s.temperature for s in settings)
        keys = jax.vmap(jax.random.key)(jnp.asarray([s.seed for s in settings]))
        how = tuple(jnp.asarray([getattr(s, name) for s in settings]) for name in ("temperature", "top_k", "top_p"))
        state = _State(
            cache, logits, jnp.zeros((len(prompts), one.max_tokens), jnp.int32), jnp.zeros((), jnp.int32),
            jnp.zeros(len(prompts), bool), position,
        )  # fmt: skip
        seen = 0
        while seen < one.max_tokens:
            limit = min(seen + every, one.max_tokens)
            state = self._advance(self._state, state, jnp.asarray(limit), keys, how, stops=one.stops, drawing=drawing)
            tokens, count, done = jax.device_get((state.tokens, state.count, state.done))
            told({row: _cut(tokens[i, :count], one.stops).tokens[seen:] for i, row in enumerate(rows)})
            seen = int(count)
            if done.all():
                break
        return [_cut(tokens[i, :seen], one.stops) for i in range(len(rows))]

    def _beam(self, prompts, settings, rows, every, told) -> list[Answer]:
        one, many = settings[0], len(prompts)
        cache, logits, position = self._start(prompts, one.max_tokens, copies=one.beams)
        shape = (many, one.beams)
        scores = jnp.full(shape, _NEVER).at[:, 0].set(0.0)
        state = _Beams(
            cache, logits, jnp.zeros((*shape, one.max_tokens), jnp.int32), scores, jnp.zeros((*shape, one.max_tokens), jnp.int32),
            jnp.zeros(shape, jnp.int32), jnp.full(shape, _NEVER), jnp.ones(many, bool), jnp.zeros((), jnp.int32),
            jnp.ones((), bool), position,
        )  # fmt: skip
        penalty = jnp.asarray([s.length_penalty for s in settings], jnp.float32)
        tokens, lengths = self._search(self._state, state, penalty, stops=one.stops, beams=one.beams)
        tokens, lengths = jax.device_get((tokens, lengths))
        return [_cut(tokens[i, : lengths[i]], one.stops) for i in range(len(rows))]


def _cut(tokens: np.ndarray, stops: tuple[int, ...]) -> Answer:
    ends = np.flatnonzero(np.isin(tokens, stops))
    return Answer(tokens[: ends[0]].tolist(), True) if len(ends) else Answer(tokens.tolist(), False)


def _prefill(model, config, state, ids, segments, *, slots: int, copies: int):
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    logits, cache = model(state, ids, segments, positions, empty_cache(config, ids.shape[0], slots))
    again = lambda leaf, axis: jnp.repeat(leaf, copies, axis=axis)  # noqa: E731
    keys, values = (tuple(again(leaf, 1) for leaf in part) for part in (cache.keys, cache.values))
    cache = Cache(keys, values, again(cache.segment_ids, 0), cache.used)
    return cache, again(logits, 0), again(segments.sum(axis=1), 0)


def _step(model, state, tokens, position, cache):
    """Compute the logits after one more token in every row."""
    ids = tokens[:, None]
    return model(state, ids, jnp.ones_like(ids), position[:, None], cache)


def _advance(model, params, state: _State, limit, keys, how, *, stops, drawing) -> _State:
    """Write tokens until there are `limit`, or all rows have ended."""

    def body(state: _State) -> _State:
        token = _drawn(state.logits, keys, state.count, *how) if drawing else jnp.argmax(state.logits, axis=-1)
        token = token.astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1)
        done = state.done | _is_stop(token, stops)
        logits, cache = _step(model, params, token, state.position, state.cache)
        return _State(cache, logits, tokens, state.count + 1, done, state.position + 1)

    return jax.lax.while_loop(lambda s: (s.count < limit) & ~jnp.all(s.done), body, state)


def _is_stop(token: jax.Array, stops: tuple[int, ...]) -> jax.Array:
    return jnp.isin(token, jnp.asarray(stops, jnp.int32)) if stops else jnp.zeros(token.shape, bool)


def _drawn(logits, keys, count, temperature, top_k, top_p) -> jax.Array:
    """Draw a token for every row; the likeliest where the temperature is 0."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    place = jnp.arange(logits.shape[-1])[None]
    ranked = jnp.where((top_k[:, None] == 0) | (place < top_k[:, None]), ranked, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where((place == 0) | (before < top_p[:, None]), ranked, -jnp.inf)
    drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, count), row))(keys, ranked)
    return jnp.take_along_axis(order, jnp.where(temperature > 0, drawn, 0)[:, None], axis=-1)[:, 0]


def _search(model, params, state: _Beams, penalty, *, stops, beams) -> tuple[jax.Array, jax.Array]:
    """Search to the end; return the best finished answer of every prompt, and its length."""
    many, _, most = state.tokens.shape
    # At least K of the candidates go on, whatever ends.
    kept = max(2, 1 + len(stops)) * beams
    take = lambda array, at: jnp.take_along_axis(array, at.reshape(*at.shape, *(1,) * (array.ndim - 2)), axis=1)  # noqa: E731

    def body(s: _Beams) -> _Beams:
        logp = jax.nn.log_softmax(s.logits, axis=-1).reshape(many, beams, -1) + s.scores[..., None]
        scores, flat = jax.lax.top_k(logp.reshape(many, -1), kept)
        parents, token = flat // logp.shape[-1], (flat % logp.shape[-1]).astype(jnp.int32)
        tokens = take(s.tokens, parents).at[:, :, s.count].set(token)
        ends = _is_stop(token, stops) | (s.count + 1 == most)
        length = (s.count + 1).astype(jnp.float32)

        ending = ends & (jnp.arange(kept) < beams) & s.open[:, None]
        value = jnp.where(ending, scores / length ** penalty[:, None], _NEVER)
        best, at = jax.lax.top_k(jnp.concatenate([s.ended_scores, value], axis=1), beams)
        ended = take(jnp.concatenate([s.ended, tokens], axis=1), at)
        lengths = take(jnp.concatenate([s.lengths, jnp.full((many, kept), s.count + 1)], axis=1), at)

        running, at = jax.lax.top_k(jnp.where(ends, scores + _NEVER, scores), beams)
        token, tokens, parents = take(token, at), take(tokens, at), take(parents, at)
        full = jnp.min(best, axis=1) > _NEVER / 2
        worst = jnp.where(full, jnp.min(best, axis=1), _NEVER)
        still = s.open & (running[:, 0] / length**penalty > worst)
        going = jnp.any(still) & ~jnp.all(ends)

        rows = (jnp.arange(many)[:, None] * beams + parents).reshape(-1)
        keys, values = (tuple(leaf[:, rows] for leaf in part) for part in (s.cache.keys, s.cache.values))
        cache = Cache(keys, values, s.cache.segment_ids[rows], s.cache.used)
        logits, cache = _step(model, params, token.reshape(-1), s.position, cache)
        return _Beams(cache, logits, tokens, running, ended, lengths, best, still, s.count + 1, going, s.position + 1)

    s = jax.lax.while_loop(lambda s: s.going & (s.count < most), body, state)
    return s.ended[:, 0], s.lengths[:, 0]
