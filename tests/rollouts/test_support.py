"""Keep Sampling Mask (DeepSeek-V3.2, arXiv:2512.02556): sampler and trainer speak of one truncated distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from experiments.common.sampling import greedy_of, keep_support
from rljax.models import policy
from rljax.models.distillation import make_compare
from rljax.models.policy import make_annotate, make_policy
from rljax.ops import sampling as ops
from rljax.rollouts.partial import carry_from_arrays, carry_to_arrays, empty_carry, resume_rows, unfinished_rows
from rljax.rollouts.sample_token import _draw_from_support, check_logp, check_sampling, distribution_settings
from rljax.rollouts.sampler import build_trajectory, sample, sampling_settings, to_device
from rljax.rollouts.streaming import stream
from rljax.train.packing import pack_batch
from rljax.types import Batch, Distillation, Sampling, TrainState, check_shapes, trajectory_of_tokens
from rollouts.common import CLOSE, CONFIG, LM, STOP, completions, draws, kept, logits_of, make_rows
from tests import bounds

SEED = 4
K = 16
SAMPLING = Sampling(n=4, max_tokens=16, stop=STOP, temperature=1.3, top_p=0.8, min_p=0.02, support=K)
POLICY = jax.jit(make_policy(CONFIG))


@pytest.fixture(scope="module")
def rows():
    return make_rows([2, 9, 4, 7, 1, 6])


@pytest.fixture(scope="module")
def traj(params, rows):
    return sample(LM, params, {}, rows, SAMPLING, SEED, 0)


def static(params, rows):
    return sample(LM, params, {}, rows, SAMPLING, SEED, 0)


def in_slots(params, rows):
    return sample(LM, params, {}, rows, SAMPLING.replace(max_concurrent=5), SEED, 0)


def streamed(params, rows):
    *_, last = stream(LM, params, {}, rows, SAMPLING, SEED, 0)
    prompts = to_device(rows, 0)
    return build_trajectory(prompts, sampling_settings(prompts, SAMPLING, jnp.int32(SEED)), SAMPLING, last, None)


def interrupted(params, rows):
    """Completions that one call began and another ended."""
    traj = sample(LM, params, {}, rows, SAMPLING.replace(stop_after=4), SEED, 0)
    assert unfinished_rows(traj).sum() > 4
    resumed = resume_rows(rows, traj, SAMPLING.n, 0)
    return sample(LM, params, {}, resumed, SAMPLING.replace(stop_after=None), SEED, 1)


def whole_distributions(params, traj, temperature=SAMPLING.temperature):
    return softmax(np.float64(logits_of(params, traj)) / temperature, axis=-1)


def support_as_set(traj) -> np.ndarray:
    """[B T V] bool"""
    return (np.asarray(traj.support)[..., None] == np.arange(CONFIG.vocab_size)).any(axis=2)


def close(got, want, traj):
    assert np.isfinite(np.asarray(got)[np.asarray(traj.mask)]).all()  # NaN is close to NaN
    np.testing.assert_allclose(
        np.where(traj.mask, got, 0), np.where(traj.mask, want, 0), rtol=0, atol=bounds.of_logp(CONFIG, traj)
    )


@pytest.mark.parametrize("engine", [static, in_slots, streamed, interrupted])
def test_every_engine_keeps_what_it_drew_from_and_the_trainer_agrees(params, rows, engine):
    traj = engine(params, rows)
    check_shapes(traj)
    mask = np.asarray(traj.mask)
    assert traj.support.shape == (*mask.shape, K)
    assert traj.support.dtype == jnp.int32
    assert (np.asarray(traj.support)[~mask] == -1).all()
    inside = support_as_set(traj)
    sizes = inside.sum(axis=-1)[mask]
    assert sizes.min() < 4 < sizes.max() <= K  # else truncation has not been tested
    probs = whole_distributions(params, traj)
    within = np.where(inside, probs, 0.0)
    chosen = np.take_along_axis(within, np.asarray(traj.actions)[..., None], axis=-1)[..., 0]
    assert (chosen[mask] > 0).all()
    renormalized = np.log(np.where(mask, chosen, 1.0)) - np.log(np.where(mask, within.sum(axis=-1), 1.0))
    close(traj.logp, renormalized, traj)
    out = POLICY(params, {}, traj)
    close(out.logp, traj.logp, traj)
    pi = within / np.where(mask, within.sum(axis=-1), 1.0)[..., None]
    close(out.entropy, -(pi * np.log(np.where(pi > 0, pi, 1.0))).sum(axis=-1), traj)
    close(out.sum_pi_squared, (pi**2).sum(axis=-1), traj)


def test_the_support_is_what_the_settings_keep(params, rows):
    """By sorting, with thresholds moved by more than rounding either way."""
    wide = SAMPLING.replace(support=CONFIG.vocab_size)
    traj = sample(LM, params, {}, rows, wide, SEED, 0)
    mask = np.asarray(traj.mask)
    inside = support_as_set(traj)
    probs = whole_distributions(params, traj)
    few = kept(probs, None, SAMPLING.top_p - 1e-4, SAMPLING.min_p + 1e-4)
    many = kept(probs, None, SAMPLING.top_p + 1e-4, SAMPLING.min_p - 1e-4)
    assert (few <= inside)[mask].all()
    assert (inside <= many)[mask].all()
    tokens, distance = draws(params, rows, wide, SEED, 0, traj)
    got, _, drawn = completions(traj, wide)
    clear = drawn & (distance >= CLOSE)
    np.testing.assert_array_equal(got[clear], tokens[clear])


def test_a_support_that_is_too_small_cuts_the_draw_too(params, rows):
    traj = sample(LM, params, {}, rows, SAMPLING.replace(support=3), SEED, 0)
    mask = np.asarray(traj.mask)
    inside = support_as_set(traj)
    probs = whole_distributions(params, traj)
    least = np.where(inside, probs, 1.0).min(axis=-1)
    most_left_out = np.where(inside, 0.0, probs).max(axis=-1)
    assert inside.sum(axis=-1)[mask].max() == 3
    assert (least * (1 + 1e-4) >= most_left_out)[mask].all()
    close(POLICY(params, {}, traj).logp, traj.logp, traj)


@pytest.mark.parametrize("k", [3, 20, CONFIG.vocab_size])
def test_a_token_is_drawn_as_from_the_whole_vocabulary(k):
    """A uniform number selects the token that it selects among all ids in their order; sums of these are exact."""
    B, V = 600, CONFIG.vocab_size
    random = np.random.default_rng(0)
    masses = jnp.asarray(random.integers(0, 9, (B, V)) / np.float32(8))
    uniform = jnp.asarray(np.arange(B) / np.float32(1024))
    cuts = jnp.asarray(random.integers(1, k + 1, B)), jnp.asarray(random.integers(1, 9, B) / np.float32(8)), None
    token, support = jax.jit(_draw_from_support, static_argnums=2)(masses, cuts, k, uniform, jnp.arange(B) % 4 == 0)

    largest, ids = jax.lax.top_k(ops.truncate(masses, *cuts), k)
    among_all = jnp.zeros_like(masses).at[jnp.arange(B)[:, None], ids].set(largest)
    want = np.where(np.arange(B) % 4 == 0, among_all.argmax(axis=1), ops.invert_cdf(among_all, uniform))
    np.testing.assert_array_equal(token, want)
    np.testing.assert_array_equal(support, jnp.where(largest > 0, ids, -1))
    assert len(np.unique(token)) > V // 2


def test_no_stop_before_min_tokens_is_a_support_too(params, rows):
    traj = sample(LM, params, {}, rows, SAMPLING.replace(min_tokens=8), SEED, 0)
    first = np.asarray(traj.mask) & (np.cumsum(traj.mask, axis=1) <= 8)
    assert not support_as_set(traj)[first][:, list(STOP)].any()
    close(POLICY(params, {}, traj).logp, traj.logp, traj)


# ------------------------------------------------------------------------------------------------ the policy's gradient

TOP_P = 0.8
TEMPERATURE = 1.5
PROMPT = [9, 11, 13]
VOCABULARY = CONFIG.vocab_size


def every_completion(params):
    """All completions of two tokens that top-p leaves: trajectory with its support, and the kept sets by sorting."""

    def next_distribution(texts):
        texts = jnp.asarray(texts, jnp.int32)
        places = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
        hidden, _ = LM.forward(params["decoder"], {}, texts, places, jnp.ones_like(texts), None)
        logits = np.float64(policy.decoder.logits(CONFIG, params["decoder"], hidden[:, -1]))
        return softmax(logits / TEMPERATURE, axis=-1)

    first = kept(next_distribution([PROMPT]), None, TOP_P)[0]
    starts = np.flatnonzero(first)
    second = kept(next_distribution([[*PROMPT, a] for a in starts]), None, TOP_P)
    pairs = [(i, b) for i, inside in enumerate(second) for b in np.flatnonzero(inside)]
    tokens = np.array([[*PROMPT, starts[i], b] for i, b in pairs], np.int32)

    def ids(inside):
        found = np.flatnonzero(inside)
        return np.pad(found, (0, VOCABULARY - len(found)), constant_values=-1)

    nothing = np.full(VOCABULARY, -1)
    support = np.array([[nothing] * 3 + [ids(first), ids(second[i])] for i, _ in pairs], np.int32)
    chosen = np.zeros(tokens.shape, bool)
    chosen[:, -2:] = True
    zeros = jnp.zeros(tokens.shape)
    facts = {"temperature": zeros + TEMPERATURE, "support": jnp.asarray(support)}
    traj = trajectory_of_tokens(tokens, np.ones_like(tokens), chosen, zeros, **facts)
    return traj, first, second[[i for i, _ in pairs]]


def flat(tree):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.fixture(scope="module")
def gradients(params):
    """Of the truncated policy's expected reward: by differentiating its probabilities, and REINFORCE's two."""
    traj, first, second = every_completion(params)
    assert 8 < len(traj.mask) < 400
    rewards = jnp.asarray(np.random.default_rng(0).random(len(traj.mask)), jnp.float32)

    def probability(params):
        """Of each completion: the whole softmax, zeros outside, divided by what is left."""
        probs = jax.nn.softmax(logits_of(params, traj)[:, -2:] / TEMPERATURE, axis=-1)
        inside = jnp.stack([jnp.broadcast_to(first, second.shape), second], axis=1)
        probs = jnp.where(inside, probs, 0.0)
        probs = probs / probs.sum(axis=-1, keepdims=True)
        return jnp.take_along_axis(probs, traj.actions[:, -2:, None], axis=-1)[..., 0].prod(axis=1)

    share = probability(params)
    np.testing.assert_allclose(share.sum(), 1.0, atol=1e-5)

    def reinforce(traj):
        def surrogate(params):
            logp = make_policy(CONFIG, chunk_tokens=len(traj.mask))(params, {}, traj).logp
            return (share * rewards * jnp.where(traj.mask, logp, 0.0).sum(axis=1)).sum()

        return flat(jax.jit(jax.grad(surrogate))(params))

    true = flat(jax.jit(jax.grad(lambda params: (probability(params) * rewards).sum()))(params))
    return true, reinforce(traj), reinforce(traj.replace(support=None))


def test_with_the_support_the_gradient_is_that_of_the_truncated_policy(gradients):
    true, with_support, _ = gradients
    assert np.linalg.norm(with_support - true) <= 1e-5 * np.linalg.norm(true)


def test_without_the_support_it_is_another_one(gradients):
    true, _, without = gradients
    print(f"cosine without the support: {cosine(without, true):.3f}")
    assert cosine(without, true) < 0.9


@pytest.mark.parametrize("chunk_tokens", [7, 24])
def test_chunks_change_nothing(params, traj, chunk_tokens):
    def total(params, chunk_tokens):
        out = make_policy(CONFIG, chunk_tokens)(params, {}, traj)
        numbers = out.logp + 0.3 * out.entropy + 0.1 * out.sum_pi_squared
        return jnp.where(traj.mask, numbers, 0.0).sum()

    def gradient(chunk_tokens):
        return flat(jax.jit(jax.grad(lambda params: total(params, chunk_tokens)))(params))

    whole = gradient(10**6)
    assert np.isfinite(whole).all()
    assert np.linalg.norm(gradient(chunk_tokens) - whole) <= 1e-5 * np.linalg.norm(whole)


def test_packing_moves_the_support_with_its_token(params, traj):
    logp = jnp.where(traj.mask, POLICY(params, {}, traj).logp, 0.0)
    batch = Batch(traj, advantages=jnp.zeros(traj.mask.shape), mask=traj.mask, extra={"logp": logp})
    packed, _, _ = pack_batch(batch, width=48, rows=64)
    assert len(packed.mask) < len(batch.mask)
    assert packed.mask.sum() == batch.mask.sum()
    close(POLICY(params, {}, packed.traj).logp, packed.extra["logp"], packed.traj)


def test_reference_and_old_log_probs_are_of_the_same_support(params, traj):
    other = {"decoder": jax.tree.map(lambda x: 1.1 * x, params["decoder"])}
    state = TrainState(0, params, None, None, frozen={"reference": other})
    filled = make_annotate(make_policy(CONFIG), ("ref_logp", "old_logp", "sum_pi_squared"))(state, traj)
    probs = np.where(support_as_set(traj), whole_distributions(other, traj), 0.0)
    mask = np.asarray(traj.mask)
    pi = probs / np.where(mask, probs.sum(axis=-1), 1.0)[..., None]
    chosen = np.take_along_axis(pi, np.asarray(traj.actions)[..., None], axis=-1)[..., 0]
    rounding = bounds.of_decoder(CONFIG, mask.shape[1], np.abs(logits_of(other, traj)).max())
    np.testing.assert_allclose(filled.ref_logp[mask], np.log(chosen[mask]), rtol=0, atol=rounding)
    close(filled.old_logp, traj.logp, traj)


def test_the_exact_kl_is_of_the_same_support(params, traj):
    other = {"decoder": jax.tree.map(lambda x: 1.1 * x, params["decoder"])}
    mask = np.asarray(traj.mask)
    inside = support_as_set(traj)

    def log_pi(params):
        probs = np.where(inside, whole_distributions(params, traj), 0.0)
        probs = probs / np.where(mask, probs.sum(axis=-1), 1.0)[..., None]
        return np.log(np.where(probs > 0, probs, 1.0)), probs

    (old, p), (new, _) = log_pi(params), log_pi(other)
    divergence = jax.jit(policy.make_divergence(CONFIG, 24))
    got = divergence(other, params, {}, traj)
    np.testing.assert_allclose(got[mask], (p * (old - new)).sum(axis=-1)[mask], rtol=1e-3, atol=1e-4)
    gradient = jax.grad(lambda params: jnp.where(mask, divergence(params, other, {}, traj), 0.0).sum())(params)
    assert np.isfinite(flat(gradient)).all()


def test_an_action_outside_its_support_is_not_a_number(params, traj):
    mask = np.asarray(traj.mask)
    wrong = traj.replace(support=jnp.where(traj.support == traj.actions[..., None], -1, traj.support))
    several = mask & (np.asarray(traj.support >= 0).sum(axis=-1) > 1)
    assert np.isnan(POLICY(params, {}, wrong).logp[several]).all()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 5}, "sampling.top_k changes the distribution .* legal: support=k"),
        ({"top_p": 0.9}, "sampling.top_p changes the distribution"),
        ({"min_p": np.array([0.0, 0.1])}, "sampling.min_p changes the distribution"),
        ({"min_tokens": 2, "stop": STOP}, "sampling.min_tokens changes the distribution"),
        ({"repetition_penalty": 1.2}, "sampling.repetition_penalty changes the distribution"),
        ({"logit_bias": np.eye(1, VOCABULARY)[0]}, "sampling.logit_bias changes the distribution"),
        ({"top_k": 5, "support": 4}, "sampling.support is 4; legal: at least 5"),
        ({"top_p": 0.9, "support": 0}, "sampling.support is 0; legal: at least 1"),
        ({"top_p": 0.9, "support": VOCABULARY + 1}, f"legal: at most the vocabulary of {VOCABULARY}"),
        ({"top_p": 0.9, "support": 4, "logp": "policy"}, "legal with support: None"),
        ({"top_p": 0.9, "support": 4, "repetition_penalty": 1.2}, "repetition_penalty changes probabilities inside"),
        ({"top_p": 0.9, "support": 4, "logit_bias": np.ones(VOCABULARY)}, "logit_bias changes probabilities inside"),
    ],
)
def test_another_distribution_is_never_silent(params, setting, message):
    with pytest.raises(ValueError, match=message):
        sample(LM, params, {}, make_rows([2, 2]), Sampling(max_tokens=2, **setting), 0, 0)


def test_settings_that_change_nothing_are_no_reason(params):
    unchanged = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    assert sample(LM, params, {}, make_rows([2]), Sampling(max_tokens=1, **unchanged), 0, 0).support is None


def test_recipes_keep_the_support_or_refuse():
    plain = Sampling()
    assert keep_support(plain, 64, 1000) == plain
    assert keep_support(plain.replace(top_p=0.9), 64, 1000).support == 64
    assert keep_support(plain.replace(top_k=100, min_tokens=3, stop=STOP), 64, 1000).support == 100
    assert keep_support(plain.replace(min_p=0.1), 64, 40).support == 40
    for setting in ({"repetition_penalty": 1.2}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"min_tokens": 2}):
        with pytest.raises(ValueError, match="legal in training: top_k, top_p and min_p"):
            keep_support(plain.replace(stop=STOP, **setting), 64, 1000)
    with pytest.raises(ValueError, match="legal in training: above 0"):
        keep_support(plain.replace(temperature=0.0), 64, 1000)


@pytest.mark.parametrize("cuts", [{"top_p": 0.9}, {"top_k": 5, "min_p": 0.1, "min_tokens": 3, "stop": STOP}])
def test_a_greedy_baseline_is_sampled_whatever_a_run_cuts_off(cuts):
    """ReMax's: of the most likely tokens there is no distribution to keep."""
    greedy = greedy_of(keep_support(Sampling(n=8, **cuts), 64, 1000))
    check_sampling(greedy)
    check_logp(greedy)
    assert (greedy.temperature, greedy.n, greedy.min_tokens) == (0.0, 1, cuts.get("min_tokens"))
    assert not {"top_k", "top_p", "min_p"} & set(distribution_settings(greedy))  # no search for thresholds


def test_distillation_refuses_a_truncated_distribution(params, traj):
    compare = make_compare(CONFIG)
    with pytest.raises(ValueError, match="distillation compares whole distributions"):
        compare(params, {"teacher": params}, Distillation(traj), None)


def test_what_waits_keeps_its_support(params, rows):
    started = sample(LM, params, {}, rows, SAMPLING.replace(stop_after=4), SEED, 0)
    width = rows.tokens.shape[1] + SAMPLING.max_tokens
    which = np.flatnonzero(unfinished_rows(started))[: 2 * SAMPLING.n]
    waiting = resume_rows(rows, started, SAMPLING.n, 0, which, width)
    support = waiting.resume.facts["support"]
    assert (support[~waiting.resume.facts["chosen"]] == -1).all()
    assert (support[waiting.resume.facts["chosen"]] >= 0).any(axis=-1).all()
    stored = carry_to_arrays(waiting)
    empty = empty_carry(2, SAMPLING.n, width, K)
    assert {k: (v.shape, v.dtype) for k, v in stored.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}
    again = carry_from_arrays(stored, lambda numbers: [{} for _ in numbers])
    jax.tree.map(np.testing.assert_array_equal, again.resume, waiting.resume)
    for other in (None, K + 1):
        with pytest.raises(ValueError, match=f"sampling.support is {other}; legal: {K}"):
            sample(LM, params, {}, waiting, SAMPLING.replace(support=other, logp=None if other else "policy"), SEED, 1)
