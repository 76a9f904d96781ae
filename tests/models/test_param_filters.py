"""Parts of parameters by path, and what they are for: frozen layers, two learning rates, decay of matrices only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.models import decoder, lora, mlp, param_filters, policy
from rljax.train.update import make_update
from rljax.types import Objective, TrainState, trajectory_of_tokens

CONFIG = decoder.DecoderConfig(
    13, 12, 2, 2, 1, 4, 10, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm="full", tie_word_embeddings=False
)


@pytest.fixture(scope="module")
def params():
    return policy.with_value_head(policy.init(CONFIG, jax.random.key(0)), CONFIG)


def chosen(tree, marks):
    return [name for name, mark in zip(param_filters.param_paths(tree), jax.tree.leaves(marks), strict=True) if mark]


def test_names_are_the_paths_of_the_leaves():
    tree = {"b": {10: {"x": 1}, 9: [2, {"y": 3}]}, "a": 4}
    assert param_filters.param_paths(tree) == ["a", "b/9/0", "b/9/1/y", "b/10/x"]


def test_patterns_are_searched_in_paths(params):
    one = chosen(params, param_filters.path_mask(params, "^value_head", r"layers/1/mlp/(up|down)$"))
    assert one == ["decoder/layers/1/mlp/down", "decoder/layers/1/mlp/up", "value_head"]
    assert jax.tree.structure(param_filters.path_mask(params, "")) == jax.tree.structure(params)
    assert all(jax.tree.leaves(param_filters.path_mask(params, "")))
    assert not any(jax.tree.leaves(param_filters.path_mask(params)))


def test_a_pattern_that_matches_nothing_is_one_error_that_lists_what_there_is():
    tree = {"layers": {i: {"w": 0} for i in range(12)}, "w2": 0}
    with pytest.raises(ValueError, match=re.escape("no path matches 'v', 'layers/12'; there are layers/*/w, w2")):
        param_filters.path_mask(tree, "w", "v", "layers/12")


def test_what_is_frozen_moves_to_the_base(params):
    trained, base = param_filters.split_frozen(params, "embedding", "layers/0/", "head$", "scale")
    assert param_filters.param_paths(base["decoder"]["layers"][1]) == [
        *(f"attention/{n}_norm/scale" for n in ("key", "query")),
        *(f"{n}_norm/scale" for n in ("attention", "mlp")),
    ]
    assert trained.keys() == {"decoder"}
    assert trained["decoder"].keys() == {"layers"}
    assert trained["decoder"]["layers"].keys() == {1}
    assert trained["decoder"]["layers"][1].keys() == {"attention", "mlp"}
    assert sorted(param_filters.param_paths(trained) + param_filters.param_paths(base)) == sorted(
        param_filters.param_paths(params)
    )
    jax.tree.map(np.testing.assert_array_equal, decoder.full_params(CONFIG, trained, {"base": base}), params)


def test_matrices_are_neither_norms_nor_biases(params):
    adapter = {"lora": lora.init(lora.LoraConfig(2, use_dora=True), params["decoder"], jax.random.key(0))}
    attention, forward = ("key", "out", "query", "value"), ("down", "gate", "up")
    inside = [f"attention/{n}" for n in attention] + [f"mlp/{n}" for n in forward]
    layers = [f"layers/{i}/{n}" for i in range(2) for n in inside]
    assert chosen(params, param_filters.decay_mask(params)) == [f"decoder/{n}" for n in ("embedding", "head", *layers)]
    assert chosen(adapter, param_filters.decay_mask(adapter)) == [
        f"lora/{n}/{p}" for n in layers for p in ("down", "up")
    ]
    control = mlp.init(jax.random.key(0), 3, 2, 4)
    assert chosen(control, param_filters.decay_mask(control)) == [
        f"{n}/{i}/w" for n in ("actor/layers", "critic") for i in range(3)
    ]


def test_two_learning_rates_and_frozen_layers(params):
    """Steps of SGD are the gradient times the rate: against one rate for everything."""
    random = np.random.RandomState(0)
    tokens, ones = random.randint(0, 13, (2, 6)), np.ones((2, 6), bool)
    traj = trajectory_of_tokens(tokens, ones.astype(int), ones, np.zeros((2, 6), np.float32))
    model = policy.make_policy(CONFIG)
    nothing = lambda params, frozen, batch, key, map_rows: batch  # noqa: E731
    likelihood = Objective(nothing, lambda params, frozen, batch: (-model(params, frozen, batch).logp.sum(), {}))

    def change(optimizer, trained, base):
        state = TrainState(0, jax.tree.map(jnp.copy, trained), optimizer.init(trained), jax.random.key(0))
        state, _ = make_update(likelihood, optimizer)(state.replace(frozen={"base": base}), traj)
        jax.tree.map(np.testing.assert_array_equal, state.frozen["base"], base)
        return jax.tree.map(lambda new, old: np.asarray(new - old), state.params, trained)

    everything = change(optax.sgd(1.0), params, {})
    trained, base = param_filters.split_frozen(params, "layers/0/", "embedding", "value_head")
    fast = param_filters.path_mask(trained, "head$", "mlp/")
    labels = jax.tree.map(lambda mark: "fast" if mark else "slow", fast)
    groups = optax.partition({"fast": optax.sgd(0.5), "slow": optax.sgd(0.125)}, labels)
    got = dict(zip(param_filters.param_paths(trained), jax.tree.leaves(change(groups, trained, base)), strict=True))
    want = dict(zip(param_filters.param_paths(params), jax.tree.leaves(everything), strict=True))
    assert got.keys() == {n for n in want if "layers/1/" in n or n in ("decoder/head", "decoder/norm/scale")}
    for name, step in got.items():
        rate = 0.5 if name == "decoder/head" or "mlp/" in name else 0.125
        np.testing.assert_allclose(step, rate * want[name], rtol=1e-3, atol=1e-5)
        assert np.abs(step).max() > 1e-3 or name.endswith("key_bias")  # which softmax takes away
