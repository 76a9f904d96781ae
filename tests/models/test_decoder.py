"""The decoder against logits that transformers computed (record.py), in every way it is called, and its own laws."""

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
CASES = sorted(tiny.CASES)


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    """(config, params, the two texts, their recorded logits)"""
    directory = tiny.make(tmp_path_factory.mktemp(request.param), request.param)
    config = hf.read_config(directory)
    recorded = np.load(RECORDED / "tiny.npz")
    want = [recorded[f"{request.param}/{i}"] for i in range(2)]
    return config, hf.load(directory, config), tiny.tokens_of(request.param), want


def run(config, params, tokens, positions, segments, cache=None):
    """Logits [B T V] and the cache."""

    @jax.jit
    def apply(params, tokens, positions, segments, cache):
        hidden, cache = decoder.forward(config, params, tokens, positions, segments, cache)
        return decoder.logits(config, params, hidden), cache

    return apply(params, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)), cache)


def alone(config, params, ids):
    return run(config, params, ids[None], np.arange(len(ids))[None], np.ones((1, len(ids))))[0][0]


def layout(*pieces):
    """One row [1 T] of (ids, segment) pieces: tokens, positions, segments. Padding holds garbage."""
    tokens = np.concatenate([ids for ids, _ in pieces])
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in pieces])
    segments = np.concatenate([np.full(len(ids), segment) for ids, segment in pieces])
    return tokens[None], positions[None], segments[None]


def test_teacher_forced_logits_are_those_of_transformers(model):
    config, params, texts, want = model
    for ids, logits in zip(texts, want, strict=True):
        np.testing.assert_allclose(alone(config, params, ids), logits, **TOLERANCE)


@pytest.mark.parametrize("prefilled", [1, 5])
def test_logits_through_the_cache(model, prefilled):
    """Two rows of different lengths: the shorter is fed padding when it has ended."""
    config, params, texts, want = model
    longest = max(map(len, texts))
    tokens = np.stack([np.pad(ids, (0, longest - len(ids)), constant_values=9) for ids in texts])
    segments = np.stack([np.arange(longest) < len(ids) for ids in texts]).astype(int)
    positions = np.broadcast_to(np.arange(longest), tokens.shape)
    cache, out = decoder.init_cache(config, 2, longest + 3), []
    for start, stop in [(0, prefilled), *((t, t + 1) for t in range(prefilled, longest))]:
        logits, cache = run(config, params, *(x[:, start:stop] for x in (tokens, positions, segments)), cache)
        out.append(logits)
    for row, logits in zip(np.concatenate(out, axis=1), want, strict=True):
        np.testing.assert_allclose(row[: len(logits)], logits, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    config, params, texts, want = model
    for ids, logits in zip(texts, want, strict=True):
        pieces = [(np.full(5, 7), 0), (ids, 1)]
        got = run(config, params, *layout(*(pieces if side == "left" else pieces[::-1])))[0][0]
        np.testing.assert_allclose(got[5:] if side == "left" else got[:-5], logits, **TOLERANCE)


def test_packed_texts_do_not_see_each_other(model):
    config, params, texts, want = model
    row = layout((texts[1], 1), (np.full(2, 3), 0), (texts[0], 2), (np.full(3, 3), 0))
    got = run(config, params, *row)[0][0]
    np.testing.assert_allclose(got[:6], want[1], **TOLERANCE)
    np.testing.assert_allclose(got[8:-3], want[0], **TOLERANCE)


def test_rows_of_padding_give_numbers(model):
    config, params, _, _ = model
    blank = np.zeros((2, 4), int)
    assert np.isfinite(run(config, params, blank, blank, blank)[0]).all()
    assert np.isfinite(run(config, params, blank, blank, blank, decoder.init_cache(config, 2, 4))[0]).all()


def test_layers_keep_their_order():
    """nnx orders children by key: as strings, layer 10 would come before layer 2."""
    config = decoder.DecoderConfig(11, 8, 12, 2, 1, 4, 8)
    params = decoder.init(config, jax.random.key(0))
    assert list(params["layers"]) == list(range(12))
    swapped = params | {"layers": params["layers"] | {2: params["layers"][10], 10: params["layers"][2]}}
    ids = np.arange(6)
    by_hand = {i: params["layers"][i] for i in (0, 1, 10, 3, 4, 5, 6, 7, 8, 9, 2, 11)}
    moved = alone(config, swapped, ids)
    assert np.abs(moved - alone(config, params, ids)).max() > 1e-3
    renumbered = dict(enumerate(by_hand.values()))
    np.testing.assert_array_equal(moved, alone(config, params | {"layers": renumbered}, ids))


def test_forked_and_refilled_caches_go_on(model):
    config, params, texts, want = model
    ids = texts[0]
    cache = decoder.init_cache(config, 2, len(ids))
    rows = np.stack([ids[:5], ids[:5][::-1]])
    _, cache = run(config, params, rows, np.tile(np.arange(5), (2, 1)), np.ones((2, 5)), cache)
    cache = decoder.gather_cache(cache, jnp.array([0, 1, 0]))  # rows 0 and 2: the text; row 1: the other
    cache = decoder.scatter_cache(cache, jnp.array([1]), jax.tree.map(lambda x: x[:1], cache))
    rest = np.stack([ids[5:]] * 3)
    got, _ = run(config, params, rest, np.tile(np.arange(5, len(ids)), (3, 1)), np.ones(rest.shape), cache)
    for row in got:
        np.testing.assert_allclose(row, want[0][5:], **TOLERANCE)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_do_not_depend_on_remat(remat):
    def gradient(remat):
        config = decoder.DecoderConfig(11, 12, 3, 3, 1, 4, 20, remat=remat)
        params = decoder.init(config, jax.random.key(0))
        ids = jnp.arange(8)[None]

        def loss(params):
            hidden, _ = decoder.forward(config, params, ids, ids, jnp.ones_like(ids))
            return (decoder.logits(config, params, hidden) ** 2).mean()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient("none"), gradient(remat))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_made_and_read_in_their_place(shape, tied, tmp_path):
    fields = {"vocab_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    raw = tiny.BASE | fields | {"head_dim": 4, "num_hidden_layers": 1}
    directory = tiny.write(tmp_path / "model", raw, tiny.tensors_of(raw))
    config = hf.read_config(directory)
    mesh = meshes.make_mesh(*shape)
    shapes = decoder.abstract(config)
    places = meshes.param_shardings(mesh, decoder.logical_axes(config), shapes)
    assert any(not place.is_fully_replicated for place in jax.tree.leaves(places))

    read, whole = hf.load(directory, config, places), hf.load(directory, config)
    made = jax.jit(lambda key: decoder.init(config, key), out_shardings=places)(jax.random.key(0))
    init = decoder.init(config, jax.random.key(0))
    for tree, want in ((read, whole), (made, init)):
        jax.tree.map(lambda x, place: chex_equal(x.sharding, place, x.ndim), tree, places)
        jax.tree.map(np.testing.assert_array_equal, tree, want)
    ids = np.arange(7)
    np.testing.assert_allclose(alone(config, read, ids), alone(config, whole, ids), **TOLERANCE)


def chex_equal(sharding, place, ndim):
    assert sharding.is_equivalent_to(place, ndim)


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
    every = int(recorded["every"])
    np.testing.assert_allclose(alone(config, params, ids)[:, ::every], recorded["logits"], **TOLERANCE)

    cache, out = decoder.init_cache(config, 1, len(ids)), []
    for start, stop in [(0, 9), *((t, t + 1) for t in range(9, len(ids)))]:
        piece = ids[None, start:stop]
        logits, cache = run(config, params, piece, np.arange(start, stop)[None], np.ones_like(piece), cache)
        out.append(logits[0])
    np.testing.assert_allclose(np.concatenate(out)[:, ::every], recorded["logits"], **TOLERANCE)


def test_stories260k_writes_the_recorded_story(stories):
    _, config, params, recorded = stories
    start = recorded["tokens"][None, :1].astype(np.int32)
    rows = Rows(start, np.ones((1, 1), bool), np.zeros(1, np.int32), [{}], 1)
    sampling = Sampling(temperature=0.0, max_tokens=len(recorded["greedy"]))
    traj = sample(decoder.language_model(config), {"decoder": params}, {}, rows, sampling, 0, 0)
    np.testing.assert_array_equal(traj.actions[0], recorded["greedy"])


def test_a_directory_that_differs_from_the_recording_is_noticed(model):
    """The recorded logits tell a wrong epsilon, rope base, or order of heads: what a loose tolerance would miss."""
    import dataclasses

    config, params, texts, want = model
    for change in ({"norm_epsilon": config.norm_epsilon * 1.1}, {"rope_theta": config.rope_theta * 1.1}):
        wrong = dataclasses.replace(config, **change)
        assert np.abs(alone(wrong, params, texts[0]) - want[0]).max() > 2e-5


