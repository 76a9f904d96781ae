"""The same completions come out however the batch is cut, on whatever mesh: DESIGN.md §3, "the same sample"."""

import dataclasses

import jax
import numpy as np
import pytest

from rljax.models import decoder, policy
from rljax.rollouts.sampler import sample
from rljax.train import mesh as meshes
from rljax.types import Sampling
from rollouts.common import (
    CLOSE,
    CONFIG,
    LM,
    STOP,
    assert_same_sample,
    close_rows,
    completions,
    draws,
    make_rows,
    take,
)

PROMPTS = 16
SEED, STEP = 3, 11
LENGTHS = [2, 9, 4, 7, 1, 9, 3, 6, 8, 5, 2, 9, 7, 4, 1, 6]
SAMPLING = Sampling(n=4, max_tokens=16, stop=STOP)
FILTERED = SAMPLING.replace(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, logp="policy")


@pytest.fixture(scope="module")
def rows():
    return make_rows(LENGTHS, start=100)


@pytest.fixture(scope="module", params=[SAMPLING, FILTERED], ids=["plain", "filtered"])
def reference(request, params, rows):
    """(settings, the completions to all prompts at once, margins)"""
    traj = sample(LM, params, {}, rows, request.param, SEED, STEP)
    return request.param, traj, draws(params, rows, request.param, SEED, STEP, traj)


def drawn(params, rows, sampling):
    return sample(LM, params, {}, rows, sampling, SEED, STEP)


def stack(trajs):
    return jax.tree.map(lambda *xs: np.concatenate(xs), *trajs)


def test_float64_draws_the_same_tokens(reference, record_property):
    """The sampler against sorting and cumulative sums in float64, from the same uniforms and prefixes."""
    sampling, traj, (tokens, margins) = reference
    met, _ = close_rows(traj, margins)
    got, _, mask = completions(traj, sampling)
    clear = mask & (margins >= CLOSE)
    np.testing.assert_array_equal(np.where(clear, got, 0), np.where(clear, tokens, 0))
    print(f"{met.sum()} of {len(met)} rows met a boundary, smallest margin {margins[mask].min():.1e}")
    record_property("rows_at_a_boundary", int(met.sum()))
    assert met.mean() <= 0.05


@pytest.mark.parametrize("size", [4, 1])
def test_cut_into_smaller_batches(reference, params, rows, size):
    sampling, traj, (_, margins) = reference
    pieces = [drawn(params, take(rows, slice(i, i + size)), sampling) for i in range(0, PROMPTS, size)]
    assert_same_sample(sampling, traj, stack(pieces), margins)


def test_with_other_prompts_in_the_batch(reference, params, rows):
    """Half of the prompts in another order, among others that are longer: padding changes too."""
    sampling, traj, (_, margins) = reference
    which = [13, 2, 5, 7, 0, 11, 8, 4]
    some, others = take(rows, which), make_rows([12] * 8, start=500)
    pad = ((0, 0), (12 - rows.tokens.shape[1], 0))
    fields = zip((some.tokens, some.mask, some.number), (others.tokens, others.mask, others.number), strict=True)
    tokens, mask, number = (np.concatenate([np.pad(a, pad) if a.ndim == 2 else a, b]) for a, b in fields)
    mixed = others._replace(tokens=tokens, mask=mask, number=number, columns=[{}] * 16)
    got = drawn(params, mixed, sampling)
    mine = np.concatenate([np.arange(4) + 4 * i for i in which])
    cut = jax.tree.map(lambda x: np.asarray(x)[mine], traj)
    assert_same_sample(sampling, cut, jax.tree.map(lambda x: x[:32], got), margins[mine])


MESHES = [  # sizes, completions at a time, number of prompts (6 do not divide over 8 devices), weights gathered once
    ({"data": 8, "fsdp": 1}, None, PROMPTS, False),
    ({"fsdp": 8}, None, PROMPTS, True),
    ({"data": 2, "fsdp": 4}, None, PROMPTS, False),
    ({"fsdp": 2, "tensor": 4}, None, PROMPTS, False),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 16, PROMPTS, True),
    ({"fsdp": 2, "sequence": 2, "expert": 2}, None, 6, False),
]


@pytest.mark.parametrize(
    ("sizes", "max_concurrent", "prompts", "gathers"),
    [*(pytest.param(*case, marks=pytest.mark.nightly) for case in MESHES[:3]), *MESHES[3:]],
)
@pytest.mark.parametrize("reference", [SAMPLING], ids=["plain"], indirect=True)
def test_on_any_mesh(reference, params, rows, sizes, max_concurrent, prompts, gathers):
    sampling, traj, (_, margins) = reference
    mesh = meshes.make_mesh(**sizes)
    config = dataclasses.replace(CONFIG, hidden_sharding=meshes.hidden_sharding(mesh), gather_for_generation=gathers)
    places = meshes.param_shardings(mesh, policy.logical_axes(CONFIG, params), params)
    placed = meshes.shard_prompts(meshes.Shardings(None, *row_shardings(mesh)), take(rows, slice(0, prompts)))
    sampling = sampling.replace(max_concurrent=max_concurrent)
    got = sample(decoder.language_model(config), jax.device_put(params, places), {}, placed, sampling, SEED, STEP)
    count = prompts * sampling.n
    some = jax.tree.map(lambda x: np.asarray(x)[:count], traj)
    assert_same_sample(sampling, some, got, margins[:count])


def row_shardings(mesh):
    """Of rows, and of what is everywhere."""
    specs = (jax.sharding.PartitionSpec(meshes.RULES["rows"]), jax.sharding.PartitionSpec())
    return [jax.sharding.NamedSharding(mesh, spec) for spec in specs]


def test_again_gives_the_same_bits(reference, params, rows):
    sampling, traj, _ = reference
    jax.tree.map(np.testing.assert_array_equal, drawn(params, rows, sampling), traj)


def test_another_step_seed_or_number_gives_other_completions(reference, params, rows):
    sampling, traj, _ = reference
    others = [
        sample(LM, params, {}, rows, sampling, SEED, STEP + 1),
        sample(LM, params, {}, rows, sampling, SEED + 1, STEP),
        drawn(params, rows._replace(number=rows.number + PROMPTS), sampling),
    ]
    tokens = [completions(x, sampling)[0] for x in (traj, *others)]
    for i, one in enumerate(tokens):
        for other in tokens[:i]:
            assert (one != other).any(axis=1).mean() > 0.9


def test_completions_to_one_prompt_differ(reference):
    sampling, traj, _ = reference
    tokens = completions(traj, sampling)[0].reshape(PROMPTS, sampling.n, -1)
    assert np.mean([len(np.unique(group, axis=0)) for group in tokens]) > 0.9 * sampling.n
