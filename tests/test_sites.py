"""Sites and targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import UsageError, find_sites
from jaxprune.sites import flatten, unflatten
from tests.tower import sites_of, tower


def test_all_linear_leaves_out_the_head_and_orders_by_layer():
    _, params, _ = tower()
    paths = [site.path for site in find_sites(params)]
    assert paths == [f"layer_{i}/fc{j}" for i in range(3) for j in (1, 2)]


def test_layers_sort_as_numbers_and_types_come_from_the_last_part():
    kernel = jax.ShapeDtypeStruct((3, 5), np.float32)
    params = {f"layer_{i}": {"fc1": {"kernel": kernel}} for i in (10, 2, 0)}
    sites = find_sites(params)
    assert [(s.layer, s.type, s.d_in, s.d_out) for s in sites] == [
        (0, "fc1", 3, 5),
        (2, "fc1", 3, 5),
        (10, "fc1", 3, 5),
    ]
    assert sites[0].cost(4) == 32


def test_layers_of_a_scan_in_a_plain_function_are_named_by_the_axis():
    """A number in the kernel's own name is no layer's."""
    found = find_sites(tower("scan")[1], scan_axis=0)
    assert found == sites_of("scan")
    assert [(s.path, s.layer, s.cost(2)) for s in found[:3:2]] == [("layers/fc1[0]", 0, 40), ("layers/fc1[1]", 1, 40)]
    turned = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), tower("scan")[1]["layers"])
    assert [s.path for s in find_sites({"layers": turned}, ["fc2"], scan_axis=-1)] == [
        f"layers/fc2[:,:,{i}]" for i in range(3)
    ]
    with pytest.raises(UsageError, match=r"'layers/fc1' has the shape \(3, 8, 12\), which does not tell its matrix"):
        find_sites(tower("scan")[1])


@pytest.mark.parametrize("shape", ["layer_{}/{}", "layer_{}_{}", "layers_{}.{}", "body/block{}_{}", "h{}/{}"])
def test_a_layer_is_read_from_a_folder_or_from_the_kernels_own_name(shape):
    kernel = jax.ShapeDtypeStruct((3, 5), np.float32)
    params = unflatten({f"{shape.format(i, kind)}/kernel": kernel for i in (10, 2) for kind in ("fc2", "fc1")})
    assert [(s.layer, s.type) for s in find_sites(params)] == [(2, "fc1"), (2, "fc2"), (10, "fc1"), (10, "fc2")]


def test_a_decoders_layers_come_after_its_encoders():
    kernel = jax.ShapeDtypeStruct((3, 5), np.float32)
    names = [f"model/{part}/layers_{i}/fc1" for part in ("decoder", "encoder") for i in range(3)]
    sites = find_sites(unflatten({f"{name}/kernel": kernel for name in [*names, "model/shared"]}))
    assert [(s.layer, s.path) for s in sites] == [
        (0, "model/encoder/layers_0/fc1"),
        (0, "model/shared"),
        *((i, f"model/encoder/layers_{i}/fc1") for i in (1, 2)),
        *((i + 3, f"model/decoder/layers_{i}/fc1") for i in range(3)),
    ]


@pytest.mark.parametrize(
    ("targets", "count"), [(["fc1"], 3), (["layer_1/fc1", "fc2"], 4), (r"layer_[01]/fc\d", 4), (["head"], 1)]
)
def test_suffixes_and_expressions(targets, count):
    assert len(find_sites(tower()[1], targets)) == count


@pytest.mark.parametrize("targets", [["fc3"], ["fc1", "c1"], r"fc1", "layer_9/.*"])
def test_a_pattern_without_match_is_an_error_that_names_the_nearest(targets):
    with pytest.raises(UsageError, match="matches no kernel.*fc1"):
        find_sites(tower()[1], targets)


def test_other_bad_input():
    with pytest.raises(UsageError, match="not a regular expression"):
        find_sites(tower()[1], "fc(1")
    with pytest.raises(UsageError, match="no leaf named 'kernel'"):
        find_sites({"a": {"scale": np.ones(3)}})


def test_flatten_and_unflatten_are_inverse():
    one, two, three = np.zeros(1), np.zeros(2), np.zeros(3)
    tree = {"a": {"b": one, "c": {"d": two}}, "e": three}
    flat = flatten(tree)
    assert flat == {"a/b": one, "a/c/d": two, "e": three}
    assert unflatten(flat) == tree
