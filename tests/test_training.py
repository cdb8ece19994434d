"""`jp.training`: a run as one tuple of functions, and what trained weights are to a method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.tower import loss_fn, sites_of, tower


def started(method, **settings):
    model, params, x = tower()
    run = jp.training(jp.attach(model), loss_fn, optax.adamw(1e-2), method, donate=False)
    batch = {"x": x}
    return (
        run,
        batch,
        params,
        *run.start(jax.random.key(0), params, sites_of(), [batch], [{"x": x[:, None]}], **settings),
    )


def test_a_run_is_what_its_functions_are_one_by_one():
    method = jp.dplora(jp.oplora(budget=240, ranks=range(5), solver="DP"), total_steps=8, events=2, target=0.5)
    run, batch, params, state, used, plan = started(method)
    first, second = jax.random.split(jax.random.key(0))
    context = jp.Context(first, params, sites_of(), jp.attach(tower()[0]), loss_fn, [batch])
    start, optimizer = method.start(context), optax.adamw(1e-2)
    other = jp.init_state(second, start.adapters, start.masks, optimizer, method)
    step = jp.make_step(context.forward, loss_fn, optimizer, method, donate=False)
    assert used is params and plan.ranks == start.plan.ranks
    pruned = 0
    for _ in range(8):
        state, _ = run.step(used, state, batch)
        state, decision = run.prune(state)
        other, _ = step(params, other, batch)
        other, _ = jp.prune(other, method, optimizer, context)
        pruned += decision is not None
    small, small_other = run.compact(state), jp.compacted(other, method, optimizer)
    for left, right in zip(jax.tree.leaves(small.adapters), jax.tree.leaves(small_other.adapters), strict=True):
        np.testing.assert_array_equal(left, right)
    assert pruned == 2 and jp.count(small.adapters, small.masks) < plan.cost
    outputs = run.predict(params, small, batch["x"])
    np.testing.assert_allclose(outputs, context.forward(params, *run.seen(state), batch["x"]), rtol=1e-5, atol=1e-6)


def test_weights_are_trained_beside_and_methods_see_the_model_that_has_them():
    params = tower()[1]
    head = jp.init_weights(params, "^head/")
    seen = []

    def decide(state, adapters, masks, step, context):
        seen.append(context.params["head"]["kernel"])
        return state, None

    method = jp.lora(rank=2)._replace(decide=decide, events=(3,))
    run, batch, _, state, used, _ = started(method, weights=head)
    assert state.weights.keys() == head.keys() and not state.adapters.keys() & head.keys()
    for _ in range(3):
        state, _ = run.step(used, state, batch)
    state, _ = run.prune(state)
    np.testing.assert_array_equal(seen[0], state.weights["head/kernel"])
    assert np.abs(seen[0] - params["head"]["kernel"]).max() > 1e-3
    trained = jp.with_weights(params, state.weights)
    by_hand = tower()[0].apply({"params": jp.merge(trained, *run.seen(state))}, batch["x"])
    np.testing.assert_allclose(run.predict(used, state, batch["x"]), by_hand, rtol=1e-4, atol=1e-5)


def test_residual_kernels_are_what_a_run_trains_on():
    run, batch, params, state, used, _ = started(jp.pissa(rank=2))
    assert used is not params
    before = tower()[0].apply({"params": params}, batch["x"])
    np.testing.assert_allclose(run.predict(used, state, batch["x"]), before, rtol=1e-4, atol=1e-5)


def test_dropout_of_adapters_falls_without_a_word_from_the_loss():
    """The same step twice: with dropout the losses differ from step to step, as the loss passes no key."""

    def losses(dropout):
        run, batch, _, state, used, _ = started(jp.lora(rank=4, dropout=dropout))
        state = state._replace(
            adapters={path: jp.Lora(x.a, x.b + 1, x.scale, x.dropout) for path, x in state.adapters.items()}
        )
        return [float(run.step(used, state._replace(step=jnp.int32(n)), batch)[1]["loss"]) for n in range(3)]

    assert len(set(losses(0.0))) == 1 and len(set(losses(0.5))) == 3


def test_an_event_needs_a_start():
    run = jp.training(jp.attach(tower()[0]), loss_fn, optax.sgd(1.0), jp.lora())
    with pytest.raises(jp.UsageError, match="prune came before start.*call start first"):
        run.prune(started(jp.lora(rank=1))[3])
