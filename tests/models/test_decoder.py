"""The decoder against logits that transformers computed (record.py), in every way it is called, and its own laws."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tiny
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.rollouts.tokens import sample
from rljax.train import mesh as meshes
from rljax.types import Rows, Sampling

RECORDED = Path(__file__).parent / "recorded"
TOLERANCE = {"rtol": 0, "atol": 2e-5}
WIDTH = 24  # of the rows below: one compilation a model


@partial(jax.jit, static_argnames="config")
def apply(config, params, tokens, positions, segments, cache):
    hidden, cache = decoder.forward(config, params, tokens, positions, segments, cache)
    return decoder.logits(config, params, hidden), cache


def run(config, params, tokens, positions, segments, cache=None):
    """Logits [B T V] and the cache."""
    return apply(config, params, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)), cache)


def row(*pieces):
    """One row of (ids, segment) pieces, padded on the right with garbage: tokens, positions, segments."""
    length = sum(len(ids) for ids, _ in pieces)
    pieces = [*pieces, (np.full(WIDTH - length, 8), 0)]
    tokens = np.concatenate([ids for ids, _ in pieces])
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in pieces])
    return tokens, positions, np.concatenate([np.full(len(ids), segment) for ids, segment in pieces])


def rows(*rows):
    return tuple(np.stack(field) for field in zip(*rows, strict=True))


@pytest.fixture(scope="module", params=sorted(tiny.CASES))
def model(request, tmp_path_factory):
    """(config, params, two texts, their recorded logits)"""
    directory = tiny.make(tmp_path_factory.mktemp(request.param), request.param)
    config = hf.read_config(directory)
    recorded = np.load(RECORDED / "tiny.npz")
    want = [recorded[f"{request.param}/{i}"] for i in range(2)]
    return config, hf.load(directory, config), tiny.tokens_of(request.param), want


@pytest.fixture(scope="module")
def logits(model):
    """[5 WIDTH V] of five rows: each text padded on the right, each padded on the left, both packed; then padding."""
    config, params, (one, two), _ = model
    gap = (np.full(3, 7), 0)
    layout = rows(
        row((one, 1)), row((two, 1)), row(gap, (one, 1)), row(gap, (two, 1)), row((two, 1), gap, (one, 2)), row()
    )
    return np.asarray(run(config, params, *layout)[0])


def test_logits_are_those_of_transformers(model, logits):
    *_, (one, two) = model
    np.testing.assert_allclose(logits[0, : len(one)], one, **TOLERANCE)
    np.testing.assert_allclose(logits[1, : len(two)], two, **TOLERANCE)


def test_padding_on_the_left_changes_nothing(model, logits):
    *_, (one, two) = model
    np.testing.assert_allclose(logits[2, 3 : 3 + len(one)], one, **TOLERANCE)
    np.testing.assert_allclose(logits[3, 3 : 3 + len(two)], two, **TOLERANCE)


def test_packed_texts_do_not_see_each_other(model, logits):
    *_, (one, two) = model
    np.testing.assert_allclose(logits[4, : len(two)], two, **TOLERANCE)
    np.testing.assert_allclose(logits[4, len(two) + 3 :][: len(one)], one, **TOLERANCE)


def test_padding_gives_numbers(logits):
    assert np.isfinite(logits).all()


def test_logits_through_the_cache(model):
    """The shorter row is fed padding when it has ended; the cache is longer than both."""
    config, params, texts, want = model
    longest = max(map(len, texts))
    tokens = np.stack([np.pad(ids, (0, longest - len(ids)), constant_values=9) for ids in texts])
    segments = np.stack([np.arange(longest) < len(ids) for ids in texts]).astype(int)
    positions = np.broadcast_to(np.arange(longest), tokens.shape)
    cache, out = decoder.init_cache(config, 2, longest + 3), []
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, longest))]:
        logits, cache = run(config, params, *(x[:, start:stop] for x in (tokens, positions, segments)), cache)
        out.append(logits)
    got = np.concatenate(out, axis=1)
    assert np.isfinite(got).all()
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine[: len(theirs)], theirs, **TOLERANCE)


# -------------------------------------------------------------------------------------------------- one model is enough


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    directory = tiny.make(tmp_path_factory.mktemp("grouped"), "grouped")
    config = hf.read_config(directory)
    return config, hf.load(directory, config), *tiny.tokens_of("grouped"), np.load(RECORDED / "tiny.npz")["grouped/0"]


def test_forked_and_refilled_caches_go_on(grouped):
    config, params, one, two, want = grouped
    start, stop = np.arange(5), np.arange(5, len(one))
    both = np.stack([one[:5], two[:5]])
    _, cache = run(
        config, params, both, np.stack([start] * 2), np.ones((2, 5)), decoder.init_cache(config, 2, len(one))
    )
    forked = decoder.gather_cache(cache, jnp.array([0, 1]))
    refilled = decoder.scatter_cache(forked, jnp.array([1]), decoder.gather_cache(cache, jnp.array([0])))
    got, _ = run(config, params, np.stack([one[5:]] * 2), np.stack([stop] * 2), np.ones((2, len(stop))), refilled)
    for logits in got:
        np.testing.assert_allclose(logits, want[5:], **TOLERANCE)


@pytest.mark.parametrize("field", ["norm_epsilon", "rope_theta"])
def test_the_recording_tells_a_wrong_setting(grouped, field):
    config, params, one, _, want = grouped
    wrong = dataclasses.replace(config, **{field: getattr(config, field) * 1.1})
    logits, _ = run(wrong, params, *rows(row((one, 1))))
    assert np.abs(logits[0, : len(one)] - want).max() > 50 * TOLERANCE["atol"]


def test_layers_are_keyed_by_number():
    """nnx orders its children by key, and as strings 10 comes before 2."""
    config = decoder.DecoderConfig(11, 4, 11, 1, 1, 4, 4)
    params = decoder.init(config, jax.random.key(0))
    assert list(params["layers"]) == list(range(11))
    assert jax.tree.structure(params) == jax.tree.structure(decoder.abstract(config))
    numbered = params | {"layers": {i: jax.tree.map(lambda x, i=i: 0 * x + i, params["layers"][i]) for i in range(11)}}
    seen = [int(leaf[(0,) * leaf.ndim]) for leaf in jax.tree.leaves(numbered["layers"])]
    assert seen == sorted(seen)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_do_not_depend_on_remat(remat):
    ids = jnp.arange(6)[None]

    def gradient(remat):
        config = decoder.DecoderConfig(11, 12, 2, 3, 1, 4, 20, remat=remat)

        def loss(params):
            hidden, _ = decoder.forward(config, params, ids, ids, jnp.ones_like(ids))
            return (decoder.logits(config, params, hidden) ** 2).mean()

        return jax.jit(jax.grad(loss))(decoder.init(config, jax.random.key(0)))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient("none"), gradient(remat))


@pytest.mark.parametrize(("shape", "tied"), [((2, 4, 1), True), ((1, 2, 4), False)])
def test_parameters_are_made_and_read_in_their_place(shape, tied, tmp_path):
    fields = {"vocab_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    raw = tiny.BASE | fields | {"head_dim": 4, "num_hidden_layers": 1}
    directory = tiny.write(tmp_path, raw, tiny.tensors_of(raw))
    config = hf.read_config(directory)
    places = meshes.param_shardings(meshes.make_mesh(*shape), decoder.logical_axes(config), decoder.abstract(config))
    assert not any(place.is_fully_replicated for place in jax.tree.leaves(places["layers"][0]["attention"]))

    read = hf.load(directory, config, places)
    made = jax.jit(partial(decoder.init, config), out_shardings=places)(jax.random.key(0))
    for tree in (read, made):
        assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), tree, places))
    jax.tree.map(np.testing.assert_array_equal, read, hf.load(directory, config))
    whole = decoder.init(config, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), made, whole)


# ------------------------------------------------------------------------------------------------------- stories260k


@pytest.fixture(scope="module")
def stories(shared):
    directory = shared / "models" / "stories260k"
    config = hf.read_config(directory)
    return directory, config, hf.load(directory, config), np.load(RECORDED / "stories260k.npz")


def test_stories260k_logits(stories):
    directory, config, params, recorded = stories
    ids = np.array(load_tokenizer(directory).encode(str(recorded["text"])))
    np.testing.assert_array_equal(ids, recorded["tokens"])
    kept, places = slice(None, None, int(recorded["every"])), np.arange(len(ids))[None]
    logits, _ = run(config, params, ids[None], places, np.ones_like(places))
    np.testing.assert_allclose(logits[0, :, kept], recorded["logits"], **TOLERANCE)

    cache, out = decoder.init_cache(config, 1, len(ids)), []
    for start, stop in [(0, 9), *((t, t + 1) for t in range(9, len(ids)))]:
        piece = ids[None, start:stop]
        logits, cache = run(config, params, piece, places[:, start:stop], np.ones_like(piece), cache)
        out.append(logits[0])
    np.testing.assert_allclose(np.concatenate(out)[:, kept], recorded["logits"], **TOLERANCE)


def test_stories260k_writes_the_recorded_story(stories):
    _, config, params, recorded = stories
    start = recorded["tokens"][None, :1].astype(np.int32)
    begin = Rows(start, np.ones((1, 1), bool), np.zeros(1, np.int32), [{}], 1)
    sampling = Sampling(temperature=0.0, max_tokens=len(recorded["greedy"]))
    traj = sample(decoder.language_model(config), {"decoder": params}, {}, begin, sampling, 0, 0)
    np.testing.assert_array_equal(traj.actions[0], recorded["greedy"])
