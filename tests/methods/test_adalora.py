"""AdaLoRA against PEFT step by step, against its equations in float64, and after its last event."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.methods.adalora import AdaLoraState, keep, orthogonality, triplets
from tests.tower import tower

SIZES = {"one": (6, 5), "two": (5, 4)}
SEED = 5
RANK, TARGET, TINIT, TFINAL, INTERVAL, TOTAL, ALPHA = 4, 2, 3, 8, 2, 26, 32.0
LAST = TOTAL - TFINAL


def chain(params, x):
    return jnp.tanh(x @ params["one"]["kernel"]) @ params["two"]["kernel"]


def problem():
    """Return (params, factors, x, y): two linear layers with a tanh between, and a batch for every step, in float64."""
    rng = np.random.default_rng(SEED)
    params = {name: {"kernel": rng.normal(size=size) / 2} for name, size in SIZES.items()}
    factors = {
        n: [rng.normal(size=(i, RANK)) / 5, np.zeros(RANK), rng.normal(size=(RANK, o)) / 5]
        for n, (i, o) in SIZES.items()
    }
    return params, factors, rng.normal(size=(TOTAL, 9, 6)), rng.normal(size=(TOTAL, 9, 4))


def settings(**changed):
    given = dict(init_rank=RANK, target_rank=TARGET, tinit=TINIT, tfinal=TFINAL, interval=INTERVAL, total_steps=TOTAL)
    return {**given, "alpha": ALPHA, "beta1": 0.8, "beta2": 0.7, **changed}


def ours(optimizer, **changed):
    """Yield (adapters, masks) after every step and its event."""
    params, factors, x, y = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), problem())
    method, forward = jp.adalora(**settings(**changed)), jp.attach_function(chain)
    loss_fn = lambda apply, batch, key: jnp.mean(jnp.square(apply(batch["x"]) - batch["y"]))  # noqa: E731
    sites = jp.find_sites(params)
    context = jp.Context(jax.random.key(0), params, sites, forward, loss_fn)
    start = method.start(context)
    adapters = {n: dataclasses.replace(start.adapters[n], a=a, b=b) for n, (a, _, b) in factors.items()}
    state = jp.init_state(jax.random.key(1), adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method)
    for number in range(TOTAL):
        state, _ = step(params, state, {"x": x[number], "y": y[number]})
        state, _ = jp.prune(state, method, optimizer, context)
        yield state.adapters, state.masks


def by_hand(rate, weight, after):
    """The same in float64 with plain gradient descent and gradients by hand; the dead are deleted, not masked."""
    params, factors, x, y = problem()
    scale, beta1, beta2 = ALPHA / (RANK + 1e-5), 0.8, 0.7
    mean = {n: [np.zeros_like(w) for w in f] for n, f in factors.items()}
    spread = {n: [np.zeros_like(w) for w in f] for n, f in factors.items()}
    alive = {n: np.arange(RANK) for n in factors}
    for number in range(1, TOTAL + 1):
        kernel = {n: params[n]["kernel"] + scale * (a * e) @ b for n, (a, e, b) in factors.items()}
        batch, wanted = x[number - 1], y[number - 1]
        hidden = np.tanh(batch @ kernel["one"])
        outer = 2 * (hidden @ kernel["two"] - wanted) / wanted.size
        dense = {"two": hidden.T @ outer, "one": batch.T @ ((outer @ kernel["two"].T) * (1 - hidden**2))}
        grads = {}
        for n, (a, e, b) in factors.items():
            g = scale * dense[n]
            grads[n] = [g @ (e[:, None] * b).T, np.diagonal(a.T @ g @ b.T).copy(), (a * e).T @ g]
            for side, rows in ((0, a.T), (2, b)):
                off = rows @ rows.T - np.eye(len(rows))
                push = weight / 4 * 2 * off @ rows / np.linalg.norm(off)  # four factors in the mean
                grads[n][side] += push.T if side == 0 else push

        def learn(values):
            for n, ws in values.items():
                for i, w in enumerate(ws):
                    ipt = np.abs(w * grads[n][i])  # noqa: B023
                    mean[n][i] = beta1 * mean[n][i] + (1 - beta1) * ipt
                    spread[n][i] = beta2 * spread[n][i] + (1 - beta2) * np.abs(ipt - mean[n][i])

        if number < LAST and not after:
            learn(factors)
        factors = {n: [w - rate * g for w, g in zip(f, grads[n], strict=True)] for n, f in factors.items()}
        if number < LAST and after:
            learn(factors)
        if (TINIT < number < LAST and number % INTERVAL == 0) or number == LAST:
            left = (1 - (number - TINIT) / (LAST - TINIT)) ** 3
            budget = int(2 * TARGET + (2 * RANK - 2 * TARGET) * left)
            score = {
                n: m[1] * s[1] + (m[0] * s[0]).mean(0) + (m[2] * s[2]).mean(1)
                for n, m in mean.items()
                for s in [spread[n]]
            }
            floor = np.sort(np.concatenate([*score.values()]))[::-1][budget - 1]
            kept = {n: v >= floor for n, v in score.items()}
            if number < LAST:
                factors = {n: [a, np.where(kept[n], e, 0), b] for n, (a, e, b) in factors.items()}
            else:
                factors = {n: [a[:, kept[n]], e[kept[n]], b[kept[n]]] for n, (a, e, b) in factors.items()}
                alive = {n: np.flatnonzero(kept[n]) for n in factors}
        yield factors, alive


@pytest.mark.parametrize("weights", ["before", "after"])
def test_the_equations_in_double_precision(weights):
    masked = set()
    pairs = zip(
        ours(optax.sgd(0.2), orthogonal=0.2, weights=weights), by_hand(0.2, 0.2, weights == "after"), strict=True
    )
    for number, ((adapters, masks), (factors, alive)) in enumerate(pairs, 1):
        for n, (a, e, b) in factors.items():
            x, at = adapters[n], alive[n]
            assert np.flatnonzero(masks[n]).tolist() == at.tolist()
            assert (np.asarray(x.e)[at] == 0).tolist() == (e == 0).tolist()
            for left, right in ((x.a[:, at], a), (x.e[at], e), (x.b[at], b)):
                np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5, err_msg=f"{n} after step {number}")
            if number > 1:
                masked |= {(number, n, j) for j in np.flatnonzero(e == 0)}
    assert len({(n, j) for _, n, j in masked}) > 2 * (RANK - TARGET)  # some component was masked and came back
    assert sum(len(at) for at in alive.values()) == 2 * TARGET


@pytest.mark.parametrize("orthogonal", [0.0, 0.1])
def test_peft_step_by_step(orthogonal):
    """Same masks at every event and same weights, over warm-up, pruning and last phase.

    The penalty of PEFT goes on including what is masked in the last phase; with it the comparison ends there.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.set_num_threads(1)
    params, factors, x, y = problem()
    tensor = lambda value: torch.tensor(np.asarray(value, np.float32))  # noqa: E731

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, (i, o) in SIZES.items():
                layer = torch.nn.Linear(i, o, bias=False)
                layer.weight.data = tensor(params[name]["kernel"].T.copy())
                setattr(self, name, layer)

        def forward(self, x, y):
            return types.SimpleNamespace(loss=torch.mean((self.two(torch.tanh(self.one(x))) - y) ** 2))

    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=TINIT, tfinal=TFINAL, deltaT=INTERVAL, beta1=0.8, beta2=0.7, total_step=TOTAL,
        lora_alpha=ALPHA, orth_reg_weight=orthogonal, target_modules=list(SIZES),
    )  # fmt: skip
    model = peft.get_peft_model(Chain(), config)
    named = dict(model.named_parameters())
    theirs = {n: [named[f"base_model.model.{n}.lora_{leaf}.default"] for leaf in "AEB"] for n in SIZES}
    for n, (a, _, b) in factors.items():
        theirs[n][0].data, theirs[n][2].data = tensor(a.T.copy()), tensor(b.T.copy())
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=1e-2)

    events = 0
    mine = ours(optax.adam(1e-2), orthogonal=orthogonal, weights="after")
    for number, (adapters, masks) in enumerate(mine, 1):
        # The wrapper of a model without a task leaves the penalty out; what it wraps adds it.
        model.base_model(tensor(x[number - 1]), tensor(y[number - 1])).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        if orthogonal and number > LAST:
            break
        for n, leaves in theirs.items():
            a, e, b = (leaf.detach().numpy() for leaf in leaves)
            mask = np.asarray(masks[n]) > 0
            assert (np.asarray(adapters[n].e) == 0).tolist() == (e[:, 0] == 0).tolist(), f"{n} after step {number}"
            if number >= LAST:
                assert mask.tolist() == model.peft_config["default"].rank_pattern[f"{n}.lora_E.default"]
            for left, right in ((adapters[n].a, a.T), (adapters[n].e, e[:, 0]), (adapters[n].b.T, b)):
                np.testing.assert_allclose(left[..., mask], right[..., mask], rtol=0, atol=1e-5)
            events += int((e == 0).sum())
    assert events > 0


def test_the_dead_stay_dead_and_can_be_compacted():
    """With a site of its own and the layers of a scan."""
    rng = np.random.default_rng(2)
    sizes = {"one": (5, 4), "stack": (3, 5, 5)}
    params = {name: {"kernel": jnp.asarray(rng.normal(size=size), jnp.float32)} for name, size in sizes.items()}
    x = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)

    def deep(params, h):
        for layer in range(3):
            h = jnp.tanh(h @ params["stack"]["kernel"][layer])
        return h @ params["one"]["kernel"]

    sites, forward = jp.find_sites(params, scan_axis=0), jp.attach_function(deep)
    method = jp.adalora(total_steps=6, tfinal=2, init_rank=4, target_rank=2, alpha=60, weights="after")
    loss_fn = lambda apply, batch, key: jnp.mean(jnp.square(apply(x) - 1))  # noqa: E731
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn)
    start, optimizer = method.start(context), optax.adam(1e-2)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    for _ in range(4):
        state, _ = step(params, state, {})
    state, decision = jp.prune(state, method, optimizer, context)
    assert decision is not None and sum(float(m.sum()) for m in state.masks.values()) == 4 * 2
    small = jp.compacted(state, method, optimizer)
    size = lambda state: sum(leaf.size for leaf in jax.tree.leaves(state.method_state))  # noqa: E731
    assert size(small) < size(state)
    for number in range(100):
        state, _ = step(params, state, {})
        if number < 5:
            small, _ = step(params, small, {})
        if number == 4:
            outputs = [jax.jit(forward)(params, s.adapters, s.masks, x) for s in (small, state)]
            np.testing.assert_allclose(*outputs, atol=1e-4)
    for path, mask in state.masks.items():
        dead = np.asarray(mask) == 0
        for tree in (state.adapters, *(optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))):
            for leaf, axis in (("a", -1), ("e", -1), ("b", -2)):
                value = np.moveaxis(np.asarray(getattr(tree[path], leaf)), axis, dead.ndim - 1)
                assert (value[dead] == 0).all() and (value[~dead] != 0).any()


def test_nothing_is_masked_when_the_budget_is_all():
    """PEFT fails here (`kthvalue` of 0)."""
    model, params, x = tower()
    method = jp.adalora(total_steps=9, init_rank=2, target_rank=2)
    start = method.start(jp.Context(jax.random.key(3), params, jp.find_sites(params), jp.attach(model), None))
    state = method.init(start.adapters, start.masks)
    adapters = {path: dataclasses.replace(a, e=a.e + 1) for path, a in start.adapters.items()}
    _, after = jax.jit(method.project)(state, adapters, start.masks, None, 4)
    assert all(bool((a.e == 1).all()) for a in after.values())
    _, decision = method.decide(state, adapters, start.masks, 9, None)
    assert all(bool((mask == 1).all()) for mask in decision.masks.values())


def test_ties_are_broken_by_path_and_index_and_the_dead_go_first():
    scores = {"b": jnp.asarray([1.0, 1.0, 5.0]), "a": jnp.asarray([1.0, 0.5, 1.0, 9.0])}
    masks = {"b": jnp.ones(3), "a": jnp.asarray([1.0, 1.0, 1.0, 0.0])}
    kept = jax.jit(keep)(scores, masks, 4)
    assert kept["a"].tolist() == [True, False, True, False] and kept["b"].tolist() == [True, False, True]


def test_triplets_and_penalty_by_hand():
    rng = np.random.default_rng(0)
    a, e, b = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3)), rng.normal(size=(2, 3, 4))
    x = {n: jp.Svd(*(jnp.asarray(v[i], jnp.float32) for v in (a, e, b)), 1.0) for i, n in enumerate("st")}
    twice = jax.tree.map(lambda leaf: 2 * leaf, x)
    scores = triplets(AdaLoraState(x, twice))
    for i, n in enumerate("st"):
        np.testing.assert_allclose(
            scores[n], 2 * e[i] ** 2 + (2 * a[i] ** 2).mean(0) + (2 * b[i] ** 2).mean(1), rtol=1e-5
        )
    norms = [np.linalg.norm(r @ r.T - np.eye(3)) for i in range(2) for r in (a[i].T, b[i])]
    np.testing.assert_allclose(orthogonality(x), np.mean(norms), rtol=1e-5)
    # One component dead at the first site, all of the second: as if they had never been there, and no NaN in the gradient.
    alive = {"s": np.asarray([1, 0, 1]), "t": np.zeros(3)}
    dead = {n: dataclasses.replace(y, a=y.a * alive[n], b=y.b * alive[n][:, None]) for n, y in x.items()}
    rows = (a[0].T[[0, 2]], b[0][[0, 2]])
    expected = np.mean([np.linalg.norm(r @ r.T - np.eye(2)) for r in rows])
    np.testing.assert_allclose(orthogonality(dead), expected, rtol=1e-5)
    for n, grads in jax.grad(orthogonality)(dead).items():
        assert np.isfinite(grads.a).all() and (np.asarray(grads.a)[:, alive[n] == 0] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [{"tinit": 18}, {"target_rank": 5}, {"target_rank": 0}, {"interval": 0}, {"beta1": 1.0}, {"weights": "new"}],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(jp.UsageError, match=next(iter(wrong))):
        jp.adalora(**settings(**wrong))


def test_the_defaults_learn_in_some_hundred_steps():
    """Two kernels learn a change of rank 2 in a quarter of 400 steps; with a scale of 2 most of the loss is left."""
    width, total = 128, 400
    keys = jax.random.split(jax.random.key(0), 6)
    params = {n: {"kernel": jax.random.normal(keys[i], (width, width)) / width**0.5} for i, n in enumerate(SIZES)}
    change = [jax.random.normal(a, (width, 2)) @ jax.random.normal(b, (2, width)) for a, b in (keys[2:4], keys[4:])]
    taught = {n: {"kernel": p["kernel"] + 2 / width * change[i]} for i, (n, p) in enumerate(params.items())}
    forward, sites = jp.attach_function(chain), jp.find_sites(params)
    loss_fn = lambda apply, x, key: jnp.mean(jnp.square(apply(x) - chain(taught, x)))  # noqa: E731
    # Four factors take the penalty that 144 have in the scripts.
    method, optimizer = jp.adalora(total_steps=total, orthogonal=0.1 * 4 / 144), optax.adamw(1e-3)
    start = method.start(jp.Context(jax.random.key(1), params, sites, forward, loss_fn))
    state = jp.init_state(jax.random.key(2), start.adapters, start.masks, optimizer, method)
    step, losses = jp.make_step(forward, loss_fn, optimizer, method), []
    for number in range(total // 4):
        state, metrics = step(start.params, state, jax.random.normal(jax.random.key(number), (32, width)))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < losses[0] / 3


@pytest.mark.parametrize(("rank", "scale"), [(2, 16), (12, 16)])
def test_the_scale_is_that_of_the_scripts(rank, scale):
    params = {"one": {"kernel": jnp.ones((5, 4))}}
    method = jp.adalora(total_steps=20, init_rank=rank, target_rank=1)
    start = method.start(jp.Context(jax.random.key(1), params, jp.find_sites(params), lambda: None, lambda: None))
    assert start.adapters["one"].scale == pytest.approx(scale, rel=1e-4)


def test_a_run_of_two_billion_steps_keeps_no_table_of_them():
    """The budget at any step, from the steps at which it falls."""
    total = 2**31 - 1
    method = jp.adalora(total_steps=total, init_rank=4, target_rank=2, interval=1, tinit=0, tfinal=0)
    params = {"one": {"kernel": jnp.ones((5, 4))}}
    start = method.start(jp.Context(jax.random.key(1), params, jp.find_sites(params), lambda: None, lambda: None))
    adapters = {path: dataclasses.replace(a, e=a.e + 1) for path, a in start.adapters.items()}
    project, state = jax.jit(method.project), method.init(adapters, start.masks)
    for number in (1, total // 5, total // 4, total - 1):  # 2 + 2 (1 - t / T)^3 is 3 at t = 0.206 T
        _, after = project(state, adapters, start.masks, None, jnp.int32(number))
        assert int((after["one"].e != 0).sum()) == int(2 + 2 * (1 - number / total) ** 3)


@pytest.mark.parametrize("weights", ["before", "after"])
def test_nothing_is_scored_from_the_last_choice_on(weights):
    """Both averages stand still in the step of the last event and after it."""
    params = {"one": {"kernel": jnp.ones((5, 4))}}
    method = jp.adalora(**settings(weights=weights))
    start = method.start(jp.Context(jax.random.key(1), params, jp.find_sites(params), lambda: None, lambda: None))
    adapters = jax.tree.map(lambda leaf: leaf + 1, dict(start.adapters))
    state = method.init(adapters, start.masks)
    for step in (LAST - 1, LAST, LAST + 1):
        seen = method.observe(state, adapters, start.masks, adapters, jnp.int32(step), None)
        seen, _ = method.project(seen, adapters, start.masks, adapters, jnp.int32(step))
        moved = any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(seen))
        assert moved == (step < LAST), step
