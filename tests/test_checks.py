"""Checks of settings: what passes passes on as the type it should be, and every other value is one line, at construction."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.checks import HostOnly, OneOf, Range, check, checked
from jaxprune.errors import shown
from jaxprune.methods import METHODS

NAN, INF = float("nan"), float("inf")
MUST = {"total_steps": 500, "measure_at": 5}
# {method: {setting: wrong values}}; each is refused alone.
WHOLE = (0, -1, 2.5, True, "2", None, 10**400, [1])
OPEN = tuple(value for value in WHOLE if value is not None)  # None follows the run
SHARE = (-0.1, 1, 1.5, NAN, INF, "0.5", True, 0.9999999999)
POSITIVE = (0, -1, NAN, INF, 1e300, 1e-300, "1", True)
NOT_NEGATIVE = (-1, NAN, INF, 1e39, "1", None)
COMMON: dict[str, tuple[Any, ...]] = {"rank": (*WHOLE, 2**16 + 1), "dropout": (*SHARE, None), "alpha": POSITIVE}
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("lora", "rslora", "lorafa", "dora"), COMMON),
    "dylora": {**COMMON, "frozen": (1, "yes", None)},
    "pissa": {**COMMON, "niter": (-1, 1.5, 10**9)},
    "vera": {"rank": WHOLE, "d_initial": POSITIVE},
    "adalora": {
        **dict.fromkeys(("total_steps", "init_rank", "target_rank"), WHOLE), "interval": OPEN,
        **dict.fromkeys(("beta1", "beta2"), (0, *SHARE)),
        "tinit": (-1, 500, 1.5), "tfinal": (-1, 500, 1.5), "orthogonal": NOT_NEGATIVE, "weights": ("new", None, 1),
    },
    "sora": {**COMMON, "penalty": NOT_NEGATIVE, "threshold": NOT_NEGATIVE[:-1], "prox": ("hard", None)},
    "loradrop": {**COMMON, "measure_at": WHOLE, "threshold": (0, 1.1, NAN), "per": ("token",)},
    "g2r2": {
        **COMMON, "interval": OPEN, "beta1": SHARE, "final": (0, -1, 1.1, NAN), "warmup": (-1, 1.5, NAN), "score": ("fast",),
        "robust": (1, "no"), "seed": (-1, 2**32, 0.5), "unit": ("heads", None),
    },
    "prunedlora": {
        **COMMON, "interval": OPEN, "remove": OPEN, "decay": SHARE, "damping": POSITIVE, "start_step": (0, 10.5),
        "first_order": (1, "no"), "curvature": ("hessian", 1), "basis": ("qr", 1),
    },
    "channelmask": {
        **COMMON, "stage": (0, 1.1, NAN), "lam": NOT_NEGATIVE[:-1], "target": (0, 1, NAN), "heads": WHOLE,
        "channels": ("all", [], [1], 3), "temperatures": ((1.0,), (1.0, 0.0), 1.0, "12"), "start_logit": (NAN, 1000),
        "learn": ("adam", None), "measure": SHARE, "decay": SHARE,
    },
    "uniformmask": {"ratio": SHARE, "stage": (0, 1.1), "shared": (1,), "choose": ("best", None), "seed": (-1, 2**32, 0.5)},
    "oplora": {
        "budget": (0, -1, 1.5, "9"), "time_budget": (0, 1.1, NAN), "score": ("fisher",), "gain": ("enegry", 1),
        "init": ("ones",), "init_rate": POSITIVE, "solver": ("GLPK", None),
        "ranks": ((), (1, 2), (0, 1.5), "012", (0, 0), 3, range(10**30)), "time_limit": (0, NAN, INF, "1"),
    },
    "dplora": {
        "target": SHARE, "ema_decay": SHARE, "events": OPEN, "delay": (-1, 0.5), "recovery_steps": (-1, 0.5, 10**30),
        "momentum": NOT_NEGATIVE[:-1], "stability": NOT_NEGATIVE[:-1], "basis": ("qr", None), "loss": ("l2", 1),
        "stop": (0, 1.1, NAN), "schedule": ("sudden", None), "scaling": ("shrink", 1),
    },
    "squeeze": {"target": SHARE, "events": OPEN, "stop": (0, 1.1, NAN), "schedule": ("sudden",)},
    "houlsby": {"reduction": (0, 0.5, NAN), "width": (0, 1.5), "activation": ("selu",), "types": ("fc2", [], [1], 3)},
    "pfeiffer": {"reduction": (0.5,), "types": ("fc2",)},
}  # fmt: skip
CASES = [(method, name) for method, settings in WRONG.items() for name in settings]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_every_wrong_setting_is_one_line_at_construction(method, name):
    factory = getattr(jp, method)
    must = {key: value for key, value in MUST.items() if key in _takes(factory)}
    factory(**must)
    for value in WRONG[method][name]:
        with pytest.raises(jp.UsageError, match=name) as error:
            factory(**{**must, name: value})
        assert len(str(error.value)) < 400 and len(str(error.value).splitlines()) == 1


def _takes(factory: Any) -> Sequence[str]:
    return factory.__wrapped__.__code__.co_varnames[: factory.__wrapped__.__code__.co_kwonlyargcount]


def test_every_factory_is_in_the_table_or_takes_nothing():
    assert set(METHODS) == {*WRONG, "full", "bitfit"}


def test_what_passes_has_its_type():
    assert check("x", np.int64(3), int) == 3 and type(check("x", np.int64(3), int)) is int
    assert type(check("x", 3, float)) is float and check("x", None, float | None) is None
    assert check("x", [1, 2], Sequence[int]) == [1, 2] and check("x", (1, 2.5), tuple[float, float]) == (1.0, 2.5)
    assert check("x", "cbc", Annotated[str, OneOf(("CBC",), fold=True)]) == "cbc"
    assert check("x", 1e300, Annotated[float, HostOnly()]) == 1e300 and check("x", "a", Literal["a", "b"]) == "a"
    assert check("x", print, float | Callable[[int], float]) is print and check("x", ["a"], str | Sequence[str]) == [
        "a"
    ]
    assert check("x", 10**30, Annotated[int, Range(1)]) == 10**30


def test_the_factory_gets_what_was_checked_and_keeps_its_defaults():
    @checked
    def factory(a: Annotated[int, Range(1)], *, b: float | None = None) -> tuple[Any, ...]:
        return a, b, type(b)

    assert factory(np.int32(2), b=3) == (2, 3.0, float) and factory(1) == (1, None, type(None))
    with pytest.raises(jp.UsageError, match="^a 0 is out of range; expected a whole number, 1 or more$"):
        factory(0)


def test_values_are_shown_on_one_short_line():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("a\nb\u2028c\udc80", 10**5000, np.arange(5000).reshape(-1, 2), deep, "x" * 10**6):
        text = shown(value)
        assert len(text) <= 200 and len(text.splitlines()) == 1
        text.encode()
