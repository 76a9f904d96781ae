"""The sampler: what a trajectory says, log-probs, distributions, stops, and how often it compiles and runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from rljax.models.policy import make_policy
from rljax.rollouts.sampler import sample
from rljax.types import Sampling, check_shapes
from rollouts.common import CONFIG, LM, STOP, completions, kept, logits_of, make_rows, rows_of, take
from tests import bounds

LENGTHS = [2, 9, 4, 7, 1, 9, 3, 6]
SAMPLING = Sampling(n=4, max_tokens=16, stop=STOP)


@pytest.fixture(scope="module")
def rows():
    return make_rows(LENGTHS)


@pytest.fixture(scope="module")
def traj(params, rows):
    return sample(LM, params, {}, rows, SAMPLING, 0, 0)


# --------------------------------------------------------------------------------------------------- the trajectory


def test_a_row_is_prompt_and_completion(traj, rows):
    n, N, L = SAMPLING.n, SAMPLING.max_tokens, rows.tokens.shape[1]
    check_shapes(traj)
    assert traj.mask.shape == (len(LENGTHS) * n, L + N - 1)
    np.testing.assert_array_equal(traj.group, np.repeat(np.arange(len(LENGTHS)), n))
    tokens, _, mask = completions(traj, SAMPLING)
    for row in range(len(traj.mask)):
        prompt = rows.tokens[row // n][rows.mask[row // n]].tolist()
        completion = tokens[row][mask[row]].tolist()
        whole, size = prompt + completion, len(prompt) + len(completion) - 1
        here = slice(L - len(prompt), L - len(prompt) + size)
        assert traj.inputs[row, here].tolist() == whole[:-1]
        assert traj.actions[row, here].tolist() == whole[1:]
        assert traj.positions[row, here].tolist() == list(range(size))
        inside = np.zeros(traj.mask.shape[1], int)
        inside[here] = 1
        np.testing.assert_array_equal(traj.segments[row], inside)
        inside[: L - 1] = 0
        np.testing.assert_array_equal(traj.mask[row], inside.astype(bool))


def test_completions_end_at_a_stop_token_or_at_the_limit(traj):
    tokens, _, mask = completions(traj, SAMPLING)
    terminated, truncated = (np.asarray(x)[:, -SAMPLING.max_tokens :] for x in (traj.terminated, traj.truncated))
    ends = {"terminated": 0, "truncated": 0}
    for row, chosen in enumerate(mask):
        length = chosen.sum()
        assert chosen[:length].all()
        stops = np.isin(tokens[row][chosen], STOP)
        assert not stops[:-1].any()
        last = np.arange(len(chosen)) == length - 1
        np.testing.assert_array_equal(terminated[row], last & stops[-1])
        np.testing.assert_array_equal(truncated[row], last & ~stops[-1])
        assert stops[-1] or length == SAMPLING.max_tokens
        ends["terminated" if stops[-1] else "truncated"] += 1
    assert min(ends.values()) > 3  # else this test has seen little
    assert not (traj.terminated | traj.truncated)[:, : -SAMPLING.max_tokens].any()
    assert set(tokens[terminated].tolist()) == set(STOP)


def test_unchosen_columns_hold_zeros(traj):
    assert np.isfinite(traj.logp).all()
    np.testing.assert_array_equal(np.where(traj.mask, 0, traj.logp), 0)
    assert (np.asarray(traj.logp)[np.asarray(traj.mask)] < 0).all()


# -------------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("filters", [{}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}], ids=["plain", "filtered"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3, 0.0])
def test_trainer_and_sampler_agree(params, rows, filters, temperature):
    """The trainer knows of no filter: both speak of the whole distribution at the sampling temperature."""
    sampling = SAMPLING.replace(temperature=temperature, logp="policy", **filters)
    traj = sample(LM, params, {}, rows, sampling, 0, 0)
    assert np.unique(traj.temperature) == np.float32(temperature or 1.0)
    logp = jax.jit(make_policy(CONFIG))(params, {}, traj).logp
    rounding = bounds.of_logp(CONFIG, traj)
    assert np.abs(np.where(traj.mask, logp - traj.logp, 0)).max() <= rounding
    shares = softmax(np.float64(logits_of(params, traj)) / (temperature or 1.0), axis=-1)
    chosen = np.take_along_axis(shares, np.asarray(traj.actions)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.where(traj.mask, traj.logp - np.log(chosen), 0), 0, atol=rounding)


def test_greedy_is_the_argmax_loop(params, rows):
    """One more forward pass over the whole text for every token, without a cache."""
    some = take(rows, slice(0, 3))
    got, _, mask = completions(
        sample(LM, params, {}, some, Sampling(temperature=0.0, max_tokens=16, stop=STOP), 0, 0), SAMPLING
    )

    prepared, frozen = LM.prepare(params, {})

    @jax.jit
    def next_tokens(tokens, length):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = LM.forward(prepared, frozen, tokens, places, jnp.ones_like(tokens), None)
        return LM.logits(prepared, frozen, hidden)[jnp.arange(3), length - 1].argmax(axis=-1)

    lengths = some.mask.sum(axis=1)
    texts = np.zeros((3, 9 + 16), np.int32)
    for row, (ids, real) in enumerate(zip(some.tokens, some.mask, strict=True)):
        texts[row, : lengths[row]] = ids[real]
    for t in range(16):
        texts[np.arange(3), lengths + t] = next_tokens(texts, lengths + t)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(got[row][mask[row]], texts[row, length:][: mask[row].sum()])


# ---------------------------------------------------------------------------------------------------- distributions

SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0},
]
NEUTRAL = {"temperature": 1.0, "top_k": CONFIG.vocab_size, "top_p": 1.0, "min_p": 0.0}


def assert_drawn_from(tokens, probs):
    """Chi-square of counts against exact probabilities; tokens expected less than five times share a bin."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), len(tokens) * probs
    assert counts[probs == 0].sum() == 0
    rare = expected < 5
    bins = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    used = bins[1] > 0
    assert used.sum() == 1 or chisquare(bins[0][used], bins[1][used]).pvalue > 1e-3


def first_tokens(params, sampling, prompts):
    """Tokens [P n] drawn first after the same prompt, and the distribution [V] of a float64 softmax's logits."""
    rows = rows_of([[11, 30, 22]] * prompts, range(prompts), 3)
    traj = sample(LM, params, {}, rows, sampling, 1, 0)
    return np.asarray(traj.actions)[:, -1].reshape(prompts, -1), np.float64(logits_of(params, traj)[0, -1])


def distribution(logits, setting):
    if setting.get("temperature") == 0:
        return np.eye(len(logits))[logits.argmax()]
    probs = softmax(logits / setting.get("temperature", 1.0))
    probs = np.where(kept(probs, *(setting.get(name) for name in ("top_k", "top_p", "min_p"))), probs, 0)
    return probs / probs.sum()


def test_first_tokens_follow_each_prompts_own_settings(params):
    """One batch in which every prompt has settings of its own."""
    arrays = {name: np.array([setting.get(name, rest) for setting in SETTINGS]) for name, rest in NEUTRAL.items()}
    tokens, logits = first_tokens(params, Sampling(n=2048, max_tokens=1, logp="policy", **arrays), len(SETTINGS))
    sizes = []
    for drawn, setting in zip(tokens, SETTINGS, strict=True):
        probs = distribution(logits, setting)
        sizes.append((probs > 0).sum())
        assert_drawn_from(drawn, probs)
    assert sizes[0] == sizes[1] == CONFIG.vocab_size
    assert sizes[3] == 5
    assert sizes[-1] == 1
    assert all(1 < size < CONFIG.vocab_size for size in sizes[3:-1])


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[6]], ids=["plain", "filtered"])
def test_first_tokens_under_one_setting_for_all(params, setting):
    """Scalars, and filters that are off altogether."""
    tokens, logits = first_tokens(params, Sampling(n=2048, max_tokens=1, logp="policy", **setting), 2)
    for drawn in tokens:
        assert_drawn_from(drawn, distribution(logits, setting))


# ------------------------------------------------------------------------------------------------ turns, compilations


def counting(lm):
    """The same model, counting how often its forward pass is traced and run."""
    seen = {"traced": 0, "run": 0}

    def run():
        seen["run"] += 1

    def forward(*args):
        seen["traced"] += 1
        jax.debug.callback(run)
        return lm.forward(*args)

    return lm._replace(forward=forward), seen


def test_the_loop_ends_with_the_last_completion(params, rows):
    lm, seen = counting(LM)
    sampling = Sampling(max_tokens=12, stop=tuple(range(CONFIG.vocab_size)))
    traj = sample(lm, params, {}, rows, sampling, 0, 0)
    jax.effects_barrier()
    assert traj.mask.sum() == len(LENGTHS)
    assert seen["run"] <= 2  # the prompts, and at most one turn


@pytest.mark.parametrize(("max_concurrent", "programs"), [(None, 1), (4, 1), (20, 2)])
def test_nothing_compiles_twice(params, rows, max_concurrent, programs):
    """The model is traced for the prompts and for each stretch of columns; with slots, for each size of the batch."""
    lm, seen = counting(LM)
    sampling = SAMPLING.replace(max_concurrent=max_concurrent)
    sample(lm, params, {}, rows, sampling, 0, 0)
    jax.effects_barrier()
    traced, turns = seen["traced"], seen["run"]
    assert traced == 1 + programs
    assert turns <= 1 + sampling.max_tokens * -(-len(LENGTHS) * sampling.n // (max_concurrent or 10**6))
    other = make_rows([9, 1, 1, 1, 1, 1, 1, 1], start=50)
    for rows_, temperature, seed, step in [(rows, 1.0, 0, 0), (rows, 0.7, 0, 0), (other, 0.0, 4, 0), (rows, 1.0, 0, 9)]:
        sample(lm, params, {}, rows_, sampling.replace(temperature=temperature), seed, step)
    assert seen["traced"] == traced


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"sampling\.temperature is -0\.1; legal: 0 to"),
        ({"temperature": 1e-6}, r"sampling\.temperature is 1e-06; legal: 0 \(greedy\), or from 1e-05"),
        ({"temperature": float("nan")}, r"sampling\.temperature is nan; legal: 0 to"),
        ({"temperature": np.array([1.0, -1.0])}, r"sampling\.temperature is .*; legal: 0 to"),
        ({"top_k": 0}, r"sampling\.top_k is 0; legal: 1 to"),
        ({"top_p": 0.0}, r"sampling\.top_p is 0\.0; legal: .* to 1"),
        ({"top_p": 1.5}, r"sampling\.top_p is 1\.5; legal: .* to 1"),
        ({"min_p": -0.5}, r"sampling\.min_p is -0\.5; legal: 0 to 1"),
        ({"min_p": 2}, r"sampling\.min_p is 2; legal: 0 to 1"),
        ({"n": 0}, "n and max_tokens must be at least 1, not 0 and 64"),
        ({"max_tokens": 0}, "n and max_tokens must be at least 1, not 1 and 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        sample(LM, {}, {}, make_rows([2, 2]), Sampling(**setting), 0, 0)
