"""The decoder against logits that transformers computed (record.py), in every way it is called, and its own laws."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from models import tiny
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import load_tokenizer
from rljax.models import caches, decoder, hf, layers, rope
from rljax.models.policy import make_policy
from rljax.rollouts import continuous_batching
from rljax.rollouts.sampler import sample
from rljax.train import mesh as meshes
from rljax.types import PromptBatch, Sampling
from tests import bounds

WIDTH = 24  # of the rows below: one compilation a model
LONGEST = 13  # of the texts
compiled = partial(jax.jit, static_argnames="config")


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Compiling is most of what a tiny model takes: half of it without optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def forward(config, params, tokens, positions, segments, cache=None):
    """Logits [B T V], and the cache."""
    hidden, cache = decoder.forward(config, params, tokens, positions, segments, cache)
    return decoder.logits(config, params, hidden), cache


apply = compiled(forward)


@compiled
def one_by_one(config, params, tokens, positions, segments):
    """Logits [B T V], column by column through a cache that is longer than the rows."""

    def step(cache, column):
        logits, cache = forward(config, params, *(x[:, None] for x in column), cache)
        return cache, logits[:, 0]

    cache = decoder.init_cache(config, tokens.shape[0], tokens.shape[1] + 3)
    return jax.lax.scan(step, cache, (tokens.T, positions.T, segments.T))[1].swapaxes(0, 1)


def run(call, config, params, layout, *more):
    return call(config, params, *(jnp.asarray(x, jnp.int32) for x in layout), *more)


def row(*pieces, width=WIDTH):
    """One row of (ids, segment) pieces, padded on the right with garbage: tokens, positions, segments."""
    length = sum(len(ids) for ids, _ in pieces)
    pieces = [*pieces, (np.full(width - length, 8), 0)]
    tokens = np.concatenate([ids for ids, _ in pieces])
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in pieces])
    return tokens, positions, np.concatenate([np.full(len(ids), segment) for ids, segment in pieces])


def rows(*rows):
    return tuple(np.stack(field) for field in zip(*rows, strict=True))


def close(config, ours, want):
    rounding = bounds.of_decoder(config, max(WIDTH, len(want)), np.abs(want).max())
    np.testing.assert_allclose(ours, want, rtol=0, atol=rounding)


def gap(width):
    return np.full(width, 7), 0


def read(directory, name):
    """(config, params, two texts, their recorded logits)"""
    config = hf.read_config(tiny.make(directory, name), context=LONGEST)
    recorded = np.load(tiny.RECORDED / "tiny.npz")
    return config, hf.load(directory, config), tiny.tokens_of(name), [recorded[f"{name}/{i}"] for i in range(2)]


@pytest.fixture(scope="module", params=tiny.CASES)
def model(request, tmp_path_factory):
    return read(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def logits(model):
    """[6 WIDTH V]: each text padded on the right, each padded on the left, both packed; a row of padding."""
    config, params, (one, two), _ = model
    layout = rows(
        row((one, 1)),
        row((two, 1)),
        row(gap(3), (one, 1)),
        row(gap(3), (two, 1)),
        row((two, 1), gap(3), (one, 2)),
        row(),
    )
    return np.asarray(run(apply, config, params, layout)[0])


def test_logits_are_those_of_transformers(model, logits):
    config, *_, (one, two) = model
    close(config, logits[0, : len(one)], one)
    close(config, logits[1, : len(two)], two)


def test_padding_on_the_left_changes_nothing(model, logits):
    config, *_, (one, two) = model
    close(config, logits[2, 3 : 3 + len(one)], one)
    close(config, logits[3, 3 : 3 + len(two)], two)


def test_packed_texts_do_not_see_each_other(model, logits):
    config, *_, (one, two) = model
    close(config, logits[4, : len(two)], two)
    close(config, logits[4, len(two) + 3 :][: len(one)], one)


def test_padding_gives_numbers(logits):
    assert np.isfinite(logits).all()


# Through the cache by default: each family, and each way in which the place of a token tells. The others differ from
# these in settings that the whole rows above are compared under.
CACHED = {
    *("grouped", "llama3", "mistral_types", "qwen2_windows", "qwen3_yarn", "moe_mixed", "moe_yarn", "gemma2"),
    *("gemma3_nested", "smollm3_windows", "olmo2_grouped", "phi3_long"),
}


@pytest.mark.parametrize(
    "model",
    [pytest.param(name, marks=() if name in CACHED else pytest.mark.nightly) for name in tiny.CASES],
    indirect=True,
)
def test_logits_through_the_cache(model):
    """The shorter text is fed padding when it has ended, or before it begins."""
    config, params, (one, two), want = model
    fit = partial(row, width=LONGEST)
    got = np.asarray(
        run(one_by_one, config, params, rows(fit((one, 1)), fit((two, 1)), fit(gap(LONGEST - len(two)), (two, 1))))
    )
    assert np.isfinite(got).all()
    pairs = (got[0], want[0]), (got[1, : len(two)], want[1]), (got[2, -len(two) :], want[1])
    for ours, theirs in pairs:
        close(config, ours, theirs)


# -------------------------------------------------------------------------------------------------- one model is enough


def test_forked_and_refilled_caches_go_on(tmp_path):
    config, params, (one, two), (want, _) = read(tmp_path, "moe_yarn")
    begin, go_on = ((ids, np.arange(len(ids)), np.ones(len(ids))) for ids in (one[:5], one[5:]))
    go_on = (go_on[0], go_on[1] + 5, go_on[2])
    other = (two[:5], *begin[1:])
    _, cache = run(apply, config, params, rows(begin, other), decoder.init_cache(config, 2, len(one)))
    longer = caches.grow(cache, 2)
    refilled = caches.scatter(longer, jnp.array([1]), caches.gather(cache, jnp.array([0])))
    for logits in run(apply, config, params, rows(go_on, go_on), refilled)[0]:
        close(config, logits, want[5:])
    forked = caches.fork(caches.gather(cache, jnp.array([0])), 2, len(go_on[0]) + 3)
    for columns in (slice(0, 6), slice(6, None)):  # the second piece begins past the window of four
        piece = [x[columns] for x in go_on]
        found, forked = run(apply, config, params, rows(piece, piece), forked)
        for logits in found:
            close(config, logits, want[5:][columns])
    assert caches.routing(forked).shape[1] == len(one) + len(go_on[0]) + 3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_window_is_all_that_a_layer_reads_of_a_forked_cache(scan_layers):
    config = decoder.DecoderConfig(11, 12, 2, 3, 1, 4, 20, windows=(5, 5), scan_layers=scan_layers)
    one = jax.ShapeDtypeStruct((4, 1), jnp.int32)

    def step(columns):
        cache = jax.eval_shape(lambda: caches.fork(decoder.init_cache(config, 2, columns), 2, columns))
        lowered = jax.jit(partial(decoder.forward, config)).lower(decoder.abstract(config), one, one, one, cache)
        return lowered.compile().cost_analysis()["flops"]

    assert step(128) == step(64)


def test_a_prompt_is_read_by_the_kernel_of_whole_rows():
    """Its keys are its own, and no array of scores [P L L] is needed; what is read later attends to the cache."""
    config = decoder.DecoderConfig(11, 12, 2, 3, 1, 4, 20, attn_implementation="splash")
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)

    def module(columns):
        cache = jax.eval_shape(partial(decoder.init_cache, config, 2, columns))
        read = jax.jit(partial(decoder.forward, config))
        exported = jax.export.export(read, platforms=["tpu"])(decoder.abstract(config), tokens, tokens, tokens, cache)
        return exported.mlir_module()

    assert "tpu_custom_call" in module(9)
    assert "tpu_custom_call" not in module(10)


def test_a_sampler_on_one_device_casts_its_matrices_once():
    """To the dtype that every product casts them to: the same numbers."""
    config = decoder.DecoderConfig(11, 12, 1, 3, 1, 4, 20, qkv_bias=True, dtype="bfloat16")
    params = decoder.init(config, jax.random.key(0))
    prepared, _ = jax.eval_shape(decoder.language_model(config, devices=1).prepare, {"decoder": params}, {})
    for path, leaf in flatten_dict(prepared).items():
        assert leaf.dtype == (jnp.float32 if path[-1] == "scale" else jnp.bfloat16), path
    ids = jnp.arange(6)[None]
    want, _ = run(apply, config, params, (ids, ids, jnp.ones_like(ids)))
    got, _ = run(apply, config, decoder.cast_matrices(config, params), (ids, ids, jnp.ones_like(ids)))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("grouped", lambda c: {"rms_norm_eps": 1.1 * c.rms_norm_eps}),
        ("grouped", lambda c: {"ropes": (rope.default(550.0, c.head_dim),) * c.num_layers}),
        ("mistral", lambda c: {"windows": tuple(w + 1 for w in c.windows)}),
        ("gemma2", lambda c: {"attention_softcap": 1.1 * c.attention_softcap}),
        ("moe", lambda c: {"moe": dataclasses.replace(c.moe, norm_topk_prob=False)}),
    ],
)
def test_the_recording_tells_a_wrong_setting(name, wrong, tmp_path):
    config, params, (one, _), (want, _) = read(tmp_path, name)
    logits, _ = run(apply, dataclasses.replace(config, **wrong(config)), params, rows(row((one, 1))))
    assert np.abs(logits[0, : len(one)] - want).max() > 50 * bounds.of_decoder(config, WIDTH, np.abs(want).max())


@pytest.mark.parametrize(("name", "max_concurrent"), [("gemma2", None), ("moe_mixed", None), ("moe_mixed", 3)])
def test_the_trainer_says_what_the_sampler_said(name, max_concurrent, tmp_path, monkeypatch):
    """Windows, soft caps and a recorded routing, in texts that outgrow the window and end at different places.

    Slots have caches that grow.
    """
    monkeypatch.setattr(continuous_batching, "INITIAL_COLUMNS", 5)
    config, params, texts, _ = read(tmp_path, name)
    tokens, mask = pad_left([ids[:size].tolist() for ids, size in zip(texts, (6, 3), strict=True)], 6, 0)
    prompts = PromptBatch(tokens, mask, np.arange(2, dtype=np.int32), [{}, {}], 2)
    sampling = Sampling(temperature=0.8, n=2, max_tokens=9, stop=(2, 3, 4), max_concurrent=max_concurrent)
    traj = sample(decoder.language_model(config), {"decoder": params}, {}, prompts, sampling, 0, 0)
    policy = jax.jit(make_policy(config))

    def difference(traj):
        logp = policy({"decoder": params}, {}, traj).logp
        return np.abs(np.where(traj.mask, logp - traj.logp, 0)).max()

    assert difference(traj) <= bounds.of_logp(config, traj)
    if config.moe is None:
        assert traj.routing is None
        return
    assert traj.routing.shape == (*traj.inputs.shape, len(config.moe.layers), config.moe.num_experts_per_tok)
    assert difference(traj.replace(routing=None)) <= bounds.of_logp(config, traj)
    assert difference(traj.replace(routing=(traj.routing + 1) % config.moe.num_experts)) > 0.1


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

    def config_of(remat):
        return decoder.DecoderConfig(11, 12, 2, 3, 1, 4, 20, remat=remat)

    def gradient(remat):
        config = config_of(remat)

        def loss(params):
            hidden, _ = decoder.forward(config, params, ids, ids, jnp.ones_like(ids))
            return (decoder.logits(config, params, hidden) ** 2).mean()

        return jax.jit(jax.grad(loss))(decoder.init(config, jax.random.key(0)))

    wanted = gradient("none")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    rounding = bounds.of_gradient(config_of(remat), ids.size, ids.size, largest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rounding), gradient(remat), wanted)


@pytest.mark.parametrize(("shape", "tied"), [((2, 4, 1), True), ((1, 2, 4), False)])
def test_parameters_are_made_and_read_in_their_place(shape, tied, tmp_path):
    fields = {"vocab_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    raw = tiny.BASE | fields | {"head_dim": 4, "num_hidden_layers": 1}
    directory = tiny.write(tmp_path, raw, tiny.tensors_of(raw))
    config = hf.read_config(directory)
    places = meshes.param_shardings(meshes.make_mesh(*shape), decoder.param_axes(config), decoder.abstract(config))
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
    return directory, config, hf.load(directory, config), np.load(tiny.RECORDED / "stories260k.npz")


def test_stories260k_logits(stories):
    directory, config, params, recorded = stories
    ids = np.array(load_tokenizer(directory).encode(str(recorded["text"])))
    np.testing.assert_array_equal(ids, recorded["tokens"])
    kept, places = slice(None, None, int(recorded["every"])), np.arange(len(ids))
    layout = rows((ids, places, np.ones_like(ids)))
    for logits in (run(apply, config, params, layout)[0], run(one_by_one, config, params, layout)):
        close(config, logits[0, :, kept], recorded["logits"])


def test_stories260k_writes_the_recorded_story(stories):
    _, config, params, recorded = stories
    start = recorded["tokens"][None, :1].astype(np.int32)
    begin = PromptBatch(start, np.ones((1, 1), bool), np.zeros(1, np.int32), [{}], 1)
    sampling = Sampling(temperature=0.0, max_tokens=len(recorded["greedy"]))
    traj = sample(decoder.language_model(config), {"decoder": params}, {}, begin, sampling, 0, 0)
    np.testing.assert_array_equal(traj.actions[0], recorded["greedy"])


def test_on_a_mesh_no_device_has_the_logits_of_all_rows():
    """Rows and vocabulary are on the same devices: the table is gathered, as other parameters are."""
    mesh = meshes.make_mesh(fsdp=2, expert=2, sequence=2)
    config = decoder.DecoderConfig(512, 8, 1, 2, 1, 4, 16, hidden_sharding=meshes.hidden_sharding(mesh))
    axes, shapes = decoder.param_axes(config), decoder.abstract(config)
    places = meshes.param_shardings(mesh, axes, shapes)
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("fsdp", "expert")))
    hidden = jax.ShapeDtypeStruct((24, 5, 8), jnp.float32, sharding=rows)

    def loss(params, hidden):
        return jax.nn.logsumexp(decoder.logits(config, params, hidden), axis=-1).sum()

    text = jax.jit(jax.grad(loss)).lower(params, hidden).compile().as_text()
    shapes_of_logits = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    largest = max(math.prod(shape) for shape in shapes_of_logits)
    assert largest <= 24 * 5 * 512 // 4


def test_a_sampler_collects_the_logits_of_no_other_rows():
    """The logits of a row come from every part of the table to the devices that have the row, and to no others."""
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    config = decoder.DecoderConfig(512, 8, 1, 2, 2, 4, 16, hidden_sharding=meshes.hidden_sharding(mesh))
    axes, shapes = decoder.param_axes(config), decoder.abstract(config)
    places = meshes.param_shardings(mesh, axes, shapes)
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    hidden = jax.ShapeDtypeStruct((24, 8), jnp.float32, sharding=rows)
    lm = decoder.language_model(config)
    text = jax.jit(lambda params, hidden: lm.logits(params, {}, hidden)).lower(params, hidden).compile().as_text()
    sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == 24 * 512 // 4


@pytest.mark.parametrize(("rows", "columns", "shape"), [(8, 6, (2, 3)), (2, 5, (1, 3)), (3, 6, (3, 3))])
def test_hidden_states_go_over_devices_that_divide_their_rows(rows, columns, shape):
    """Rows over data and fsdp, or the first of them, or none; any number of columns."""
    mesh = meshes.make_mesh(data=2, fsdp=2, sequence=2)
    x = jnp.arange(float(rows * columns * 4)).reshape(rows, columns, 4)
    got = jax.jit(lambda x: layers._with_sharding(x, meshes.hidden_sharding(mesh)) * 1.0)(x)
    np.testing.assert_array_equal(got, x)
    if columns % 2 == 0:
        assert got.sharding.shard_shape(got.shape) == (*shape, 4)
