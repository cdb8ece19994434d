"""OPLoRA: which table its plan is made of, what it says of it, and factors that begin with a step of gradient descent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.allocation import GAINS
from jaxprune.checkpoint import Checkpoints
from jaxprune.methods import METHODS
from jaxprune.scores import gradient_svd
from jaxprune.sites import flatten, layer_of
from tests.tower import begin, loss_fn, sites_of, tower

SETTINGS = dict(budget=200, ranks=range(5), solver="DP")


def dense(form, x):
    """Return the gradient of every site's kernel in float64."""
    model, params, _ = tower(form)
    flat = flatten(
        jax.jit(jax.grad(lambda p: loss_fn(lambda x: model.apply({"params": p}, x), {"x": x}, None)))(params)
    )
    return {s.path: np.asarray(layer_of(flat[f"{s.module}/kernel"], s.index), np.float64) for s in sites_of(form)}


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_the_gain_decides_the_plan(form):
    """Every plan is the one of dense gradients and their exact spectra; they differ, and `energy` captures most."""
    gradients, sites = dense(form, tower()[2]), sites_of(form)
    spectra = {path: np.linalg.svd(g, compute_uv=False) for path, g in gradients.items()}
    scores = {path: np.abs(g).mean() for path, g in gradients.items()}
    shares = {}
    for gain in GAINS:
        measured = {} if gain == "paper" else {"spectra": spectra}
        expected = jp.allocate(scores, sites, 200, ranks=range(5), solver="DP", gain=gain, **measured)
        plan = begin(jp.oplora(gain=gain, **SETTINGS), form).start.plan
        assert plan and plan.ranks == expected.ranks and plan.objective == pytest.approx(expected.objective, rel=1e-4)
        assert f"Gain {gain!r}" in plan.status and ("scored by 'absolute'" in plan.status) == (gain != "energy")
        shares[gain] = jp.captured_energy(plan.ranks, spectra)
        uniform = jp.captured_energy(dict.fromkeys(spectra, 1), spectra)  # rank 1 takes 120 of the 200 parameters
        said = f"The ranks capture {100 * shares[gain]:.1f} % of the gradients' energy; uniform rank 1: {100 * uniform:.1f} %."
        assert (said in plan.status) == (gain != "paper"), plan.status
    assert shares["energy"] > shares["effective"] >= shares["paper"]


def test_what_is_said_where_no_uniform_rank_fits_or_more_than_all_do():
    status = lambda **settings: begin(jp.oplora(gain="energy", solver="DP", **settings)).start.plan.status  # noqa: E731
    assert re.search(r"capture \d+\.\d % of the gradients' energy\.$", status(budget=119, ranks=range(5)))
    # Both are rank 4 everywhere, and that takes less than is allowed.
    share, uniform = re.findall(r"\d+\.\d %", status(budget=10**12, ranks=range(5)))
    assert share == uniform and "uniform rank 4" in status(budget=10**12, ranks=range(5))


@pytest.mark.parametrize("score", ["weight", "squared"])
def test_scores_beside_a_measured_gain(score):
    plan = begin(jp.oplora(gain="effective", score=score, **SETTINGS)).start.plan
    said = {
        "weight": "Gain 'effective'.",
        "squared": "Gain 'effective', sites scored by 'squared' of single samples, averaged.",
    }
    assert said[score] in plan.status


@pytest.mark.parametrize("form", ["plain", "scan_of_remat"])
@pytest.mark.parametrize("gain", ["paper", "energy"])
def test_factors_that_begin_with_a_step_of_gradient_descent(form, gain):
    world = begin(jp.oplora(gain=gain, init="gradient", init_rate=0.01, alpha=6.0, **SETTINGS), form)
    gradients, start = dense(form, world.batch["x"]), world.start
    merged, params = flatten(jp.merge(world.params, start.adapters, start.masks)), flatten(world.params)
    for site in sites_of(form):
        leaf = f"{site.module}/kernel"
        moved, kernel = (np.asarray(layer_of(of[leaf], site.index), np.float64) for of in (merged, params))
        rank = start.plan.ranks[site.path]
        u, s, vt = np.linalg.svd(gradients[site.path], full_matrices=False)
        step = -0.01 * (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(moved - kernel, step, atol=1e-6)
        if rank:
            adapter = start.adapters[site.path]
            assert adapter.scale == 6.0 / rank
            np.testing.assert_allclose(adapter.a.T @ adapter.a, np.eye(rank) / 3, atol=1e-5)
    loss = lambda adapters, masks: float(  # noqa: E731
        jax.jit(lambda: loss_fn(lambda x: world.forward(world.params, adapters, masks, x), world.batch, None))()
    )
    # To first order the loss falls by the rate times the energy that the ranks hold.
    held = sum(np.square(np.linalg.svd(g, compute_uv=False)[: start.plan.ranks[p]]).sum() for p, g in gradients.items())
    assert loss({}, {}) - loss(start.adapters, start.masks) == pytest.approx(0.01 * held, rel=0.1)


def test_a_rank_beyond_the_gradients_leaves_the_rest_as_lora_draws_it():
    """A kernel of 8 by 12 has 8 directions; a rank of 10 has two components more, which begin as LoRA's do."""
    settings = dict(budget=10**4, ranks=(0, 10), solver="DP")
    plain, begun = (begin(jp.oplora(init=init, **settings)).start.adapters for init in ("zero", "gradient"))
    assert len(plain) == 6
    for path, adapter in begun.items():
        np.testing.assert_array_equal(adapter.a[:, 8:], plain[path].a[:, 8:])
        assert (
            not adapter.b[8:].any() and (jnp.linalg.norm(adapter.a[:, :8] - plain[path].a[:, :8], axis=0) > 0.1).all()
        )


@pytest.mark.parametrize("settings", [
    dict(gain="effective"), dict(gain="energy"), dict(gain="energy", init="gradient"), dict(init="gradient"),
])  # fmt: skip
def test_training_goes_on_from_a_checkpoint(settings, tmp_path):
    method = jp.oplora(**SETTINGS, **settings)
    world = begin(method)
    save = Checkpoints(tmp_path)
    state, losses = world.state, []
    for number in range(6):
        if number == 3:
            save.save(state, method=method)
            save.wait()
        state, metrics = world.step(world.params, state, world.batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    again = save.restore(world.optimizer, method)
    for _ in range(3):
        again, _ = world.step(world.params, again, world.batch)
    jax.tree.map(np.testing.assert_array_equal, again.adapters, state.adapters)


def test_factors_that_do_not_begin_at_zero_are_masked_compacted_and_exported(tmp_path):
    """DPLoRA prunes them; what is left is the same function masked, compacted, and read back by load_peft."""
    method = jp.dplora(
        jp.oplora(gain="energy", init="gradient", init_rate=2.0, **SETTINGS), total_steps=6, events=2, target=0.5
    )
    world = begin(method)
    state = world.state
    for _ in range(6):
        state, _ = world.step(world.params, state, world.batch)
        state, _ = jp.prune(state, method, world.optimizer, world.context)
    live = sum(int(mask.sum()) for mask in state.masks.values())
    assert live < sum(world.start.plan.ranks.values())
    output = lambda adapters, masks: jax.jit(world.forward)(world.params, adapters, masks, world.batch["x"])  # noqa: E731
    masked = output(state.adapters, state.masks)
    assert np.abs(masked - output({}, {})).max() > 1e-3
    small = jp.compacted(state, method, world.optimizer)
    assert sum(adapter.rank for adapter in small.adapters.values()) == live
    np.testing.assert_allclose(output(small.adapters, small.masks), masked, rtol=1e-5, atol=1e-6)
    jp.save_peft(state.adapters, state.masks, tmp_path / "adapter", task_type=None)
    adapters, masks, _ = jp.load_peft(tmp_path / "adapter", world.context.sites)
    np.testing.assert_allclose(output(adapters, masks), masked, rtol=1e-5, atol=1e-6)


def test_dora_begins_as_the_same_function():
    world = begin(jp.with_dora(jp.oplora(init="gradient", init_rate=2.0, **SETTINGS)))
    plain = begin(jp.oplora(init="gradient", init_rate=2.0, **SETTINGS))
    outputs = [w.forward(w.params, w.start.adapters, w.start.masks, w.batch["x"]) for w in (world, plain)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_wide_ranks_widen_the_sketch(monkeypatch):
    """Of a spectrum as short as the ranks the last would gain nothing."""
    import sys

    seen, module = [], sys.modules["jaxprune.methods.oplora"]
    monkeypatch.setattr(module, "gradient_svd", lambda *a, columns, **k: seen.append(columns) or gradient_svd(*a, **k))
    for most in (8, 16, 40):
        begin(jp.oplora(gain="energy", ranks=range(most + 1), solver="DP"))
    assert seen == [32, 32, 80]


def test_dplora_hands_the_gain_on():
    settings = {"total_steps": 24, "events": 3, "target": 0.5, **SETTINGS}
    plans = [begin(METHODS["dplora"].make({**settings, **given})).start.plan for given in ({}, {"gain": "energy"})]
    assert plans[1].ranks == begin(jp.oplora(gain="energy", **SETTINGS)).start.plan.ranks != plans[0].ranks


def test_settings_out_of_range():
    for settings, said in [
        (dict(gain="enegry"), "gain 'enegry' is not known; expected one of paper, effective, energy; nearest: energy"),
        (dict(init="gradeint"), "init 'gradeint' is not known; expected one of zero, gradient"),
        (dict(init_rate=0), "init_rate 0 is out of range"),
    ]:
        with pytest.raises(jp.UsageError, match=said):
            jp.oplora(**settings)
    with pytest.raises(jp.UsageError, match="a sketch of gradients needs at least one batch and got none"):
        world = begin(jp.oplora(budget=200))
        jp.oplora(gain="energy").start(world.context._replace(batches=[]))
