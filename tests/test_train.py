"""The training step and loop against the same algorithm written out by hand."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.methods import Method
from jaxprune.train import leaf_names
from tests.tower import tower


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - batch["y"]))


def setting(optimizer=None, method=None, **kw):
    model, params, x = tower()
    sites = jp.find_sites(params)
    adapters, masks = jp.init_lora(jax.random.key(1), sites, {s.path: 2 for s in sites})
    optimizer = optimizer or optax.adam(1e-2)
    state = jp.init_state(jax.random.key(2), adapters, masks, optimizer, method)
    step = jp.make_step(jp.attach(model), loss_fn, optimizer, method, donate=False, **kw)
    return params, state, step, {"x": x, "y": jnp.ones((4, 2))}


def close(a, b, rtol=1e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=1e-7)


def test_a_step_is_the_optimizer_on_the_adapters_gradient():
    params, state, step, batch = setting(optax.sgd(0.1))
    new, metrics = step(params, state, batch)
    forward = jax.jit(jp.attach_function(lambda p, x: tower()[0].apply({"params": p}, x)))
    loss = lambda adapters: jnp.mean(jnp.square(forward(params, adapters, state.masks, batch["x"]) - batch["y"]))  # noqa: E731
    value, grads = jax.value_and_grad(loss)(state.adapters)
    close(new.adapters, jax.tree.map(lambda w, g: w - 0.1 * g, state.adapters, grads))
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert int(new.step) == 1 and int(metrics["nonfinite"]) == -1


def test_microbatches_give_the_step_of_the_whole_batch():
    params, state, step, batch = setting()
    whole, metrics = step(params, state, batch)
    _, _, step, _ = setting(accumulate=2)
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), batch)
    split, split_metrics = step(params, state, halves)
    close(whole.adapters, split.adapters, rtol=1e-4)
    assert float(metrics["loss"]) == pytest.approx(float(split_metrics["loss"]), rel=1e-5)


def test_loss_falls_and_the_step_is_traced_once():
    traces = []
    model, params, x = tower()
    _, state, _, batch = setting()

    def counted(apply, batch, key):
        traces.append(1)
        return loss_fn(apply, batch, key), {"aux": 0.0}

    step = jp.make_step(jp.attach(model), counted, optax.adam(1e-2))
    losses = []
    state = jp.fit(
        step,
        params,
        state,
        [batch] * 30,
        total_steps=30,
        log=lambda n, m: losses.append((n, m["loss"])),
        progress=False,
    )
    assert [number for number, _ in losses] == list(range(1, 31)) and losses[-1][1] < 0.5 * losses[0][1]
    assert len(traces) == 1 and int(state.step) == 30


def test_fit_pauses_with_the_state_of_that_very_step():
    params, state, step, batch = setting()
    expected, seen = {}, {}
    probe = state
    for number in range(1, 7):
        probe, _ = step(params, probe, batch)
        expected[number] = probe
    logged = []
    jp.fit(
        step, params, state, [batch] * 6, total_steps=6, progress=False, log=lambda n, m: logged.append(n),
        pause_at={2, 5, 6}.__contains__, pause=lambda n, s: seen.update({n: (s, list(logged))}) or (s, ""),
    )  # fmt: skip
    assert sorted(seen) == [2, 5, 6]
    for number, (paused, log) in seen.items():
        jax.tree.map(np.testing.assert_array_equal, paused.adapters, expected[number].adapters)
        assert log == list(range(1, number + 1))


def test_randomness_is_a_function_of_key_and_step():
    def noisy(apply, batch, key):
        return jnp.mean(apply(batch["x"]) * jax.random.normal(key, (4, 2)))

    model, params, x = tower()
    _, state, _, batch = setting()
    step = jp.make_step(jp.attach(model), noisy, optax.sgd(0.0), donate=False)
    first, again = step(params, state, batch)[1]["loss"], step(params, state, batch)[1]["loss"]
    later = step(params, state._replace(step=jnp.int32(1)), batch)[1]["loss"]
    assert first == again != later


def test_observe_penalty_and_project_take_part():
    method = Method(
        start=lambda context: None,  # type: ignore[arg-type,return-value]
        init=lambda adapters, masks: jnp.zeros(()),
        observe=lambda state, adapters, masks, grads, step, measured: state + optax.tree.norm(grads),
        penalty=lambda state, adapters, masks: 3.0 + 0.0 * adapters["layer_0/fc1"].b.sum(),
        project=lambda state, adapters, masks, grads, step: (
            state + 100 * step,
            jax.tree.map(lambda w: jnp.clip(w, -0.01, 0.01), adapters),
        ),
    )
    params, state, step, batch = setting(method=method)
    plain = setting()[2](params, state._replace(method_state=()), batch)[1]
    new, metrics = step(params, state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]) + 3.0, rel=1e-6)
    assert float(new.method_state) == pytest.approx(100 + float(metrics["grad_norm"]), rel=1e-6)
    assert max(float(jnp.abs(w).max()) for w in jax.tree.leaves(new.adapters)) <= 0.01


def test_a_nan_stops_training_and_names_step_and_leaf():
    params, state, step, batch = setting()
    poisoned = {**batch, "x": batch["x"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(jp.NonFiniteError, match=r"step 3: the gradient of \['layer_0/fc1'\].a is not finite"):
        jp.fit(step, params, state, [batch, batch, poisoned, batch], total_steps=4, progress=False)
    # A loss can be infinite while its gradient is not.
    model = tower()[0]
    step = jp.make_step(jp.attach(model), lambda a, b, k: loss_fn(a, b, k) + jnp.inf, optax.sgd(0.1), donate=False)
    with pytest.raises(jp.NonFiniteError, match="step 1: the loss is not finite"):
        jp.fit(step, params, state, [batch], total_steps=1, progress=False)


def test_a_step_mapped_over_states_is_the_step_of_each():
    """`fit` gives lists of metrics, and names the run that is not finite."""
    params, first, step, batch = setting()
    second = first._replace(adapters=jax.tree.map(lambda leaf: leaf + 0.1, first.adapters))
    axes = jp.TrainState._make((0, 0, 0, 0, 0, None, 0))
    mapped = jax.jit(jax.vmap(step, (None, axes, 0), (axes, 0)))
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)._replace(step=first.step)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), batch)
    logged = []
    state = jp.fit(
        mapped, params, states, [batches] * 3, total_steps=3, log=lambda n, found: logged.append(found), progress=False
    )
    for i, (alone, own) in enumerate(((first, batch), (second, jax.tree.map(lambda leaf: 2 * leaf, batch)))):
        for metrics in logged:
            alone, expected = step(params, alone, own)
            assert metrics["loss"][i] == pytest.approx(float(expected["loss"]), rel=1e-5)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], state.adapters), alone.adapters, rtol=1e-4)
    assert logged[0]["loss"][0] != logged[0]["loss"][1] and int(state.step) == 3
    poisoned = {**batches, "x": batches["x"].at[1, 0, 0, 0].set(jnp.nan)}
    with pytest.raises(jp.NonFiniteError, match=r"step 1: .* is not finite in run 2 of 2 \(loss nan\)"):
        jp.fit(mapped, params, states, [poisoned], total_steps=1, progress=False)


def test_predict_and_leaf_names():
    params, state, _, batch = setting()
    predict = jp.make_predict(jp.attach(tower()[0]), lambda apply, batch: apply(batch["x"]))
    np.testing.assert_allclose(
        predict(params, state.adapters, state.masks, batch), tower()[0].apply({"params": params}, batch["x"]), rtol=1e-5
    )
    assert leaf_names(state.adapters)[0] == "['layer_0/fc1'].a"


def test_seeds_run_side_by_side_under_vmap():
    """The whole state is one pytree, so several runs are one mapped step."""
    params, state, _, batch = setting()
    optimizer = optax.adam(1e-2)
    step = jp.make_step(jp.attach(tower()[0]), loss_fn, optimizer, donate=False)
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), state, state._replace(key=jax.random.key(9)))
    both, _ = jax.vmap(step, in_axes=(None, 0, None))(params, states, batch)
    one, _ = step(params, state, batch)
    close(jax.tree.map(lambda leaf: leaf[0], both.adapters), one.adapters)


def test_piped_progress_has_a_line_for_every_note_and_leaves_compiling_out(capfd):
    params, state, step, batch = setting()
    quick = step(params, state, batch)[0] and step

    def slow(*arguments):
        if not called:
            time.sleep(3.0)  # as compiling takes
        called.append(time.sleep(0.02))
        return quick(*arguments)

    called = []
    jp.fit(
        slow, params, state, [batch] * 20, total_steps=20,
        pause_at=lambda number: number % 10 == 0, pause=lambda number, state: (state, f"accuracy {number}"),
    )  # fmt: skip
    said = capfd.readouterr().err
    for number in (10, 20):
        assert re.search(rf"(?m)(^|\r)step {number} of 20: accuracy {number}$", said)
    elapsed = re.findall(r"20/20 \[(\d+):(\d+)<", said)[-1]
    assert 60 * int(elapsed[0]) + int(elapsed[1]) < 3
