"""Conversations of several turns: what is recorded of them, the same samples in every mode, the policy's log-probs."""

import dataclasses
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import decoder, policy
from rljax.models.moe import MoEConfig
from rljax.models.policy import make_policy
from rljax.ops.sampling import row_keys, token_uniforms
from rljax.rollouts import conversations
from rljax.rollouts.conversation_record import ConversationCounts
from rljax.rollouts.conversations import sample_conversations
from rljax.rollouts.sampler import sample
from rljax.train import mesh as meshes
from rljax.types import Observation, Sampling, Trajectory
from rollouts.common import CONFIG, logits_of, make_rows
from tests import bounds
from tests.compilations import count_compilations

LM = decoder.language_model.__wrapped__(CONFIG)  # not the one of other modules: compilations are counted
STOP = tuple(range(3, 53, 6))  # often enough that turns have all lengths
LENGTHS = [2, 9, 4, 7, 1, 6]
SAMPLING = Sampling(n=4, max_tokens=8, stop=STOP)
CONTEXT = 64
SEED, STEP = 3, 5


def answer(turn) -> Observation:
    """Of what was written alone: a reply of up to 11 tokens, an end by chance."""
    random = np.random.default_rng(turn.tokens)
    tokens = random.integers(8, 53, random.integers(0, 12)).tolist()
    end = random.random()
    return Observation(tokens, float(random.normal()), terminated=bool(end < 0.15), truncated=bool(end > 0.95))


class Environment:
    """Answers, and keeps all that was said."""

    def __init__(self):
        self.said = {}
        self.batches = []

    def respond(self, turns):
        self.batches.append([turn.row for turn in turns])
        answers = [answer(turn) for turn in turns]
        for turn, observation in zip(turns, answers, strict=True):
            self.said.setdefault(turn.row, []).append((turn, observation))
        return answers


@pytest.fixture(scope="module")
def rows():
    return make_rows(LENGTHS, start=40)


def converse(params, rows, sampling=SAMPLING, lm=LM, respond=None, **settings):
    settings = {"max_turns": 5, "max_context": CONTEXT} | settings
    return sample_conversations(
        lm, params, {}, rows, respond or Environment().respond, sampling, SEED, STEP, **settings
    )


class Kept(NamedTuple):
    traj: Trajectory
    counts: ConversationCounts
    environment: Environment
    compiled: Counter


@pytest.fixture(scope="module")
def kept(params, rows):
    environment = Environment()
    with count_compilations() as compiled:
        traj, counts = converse(params, rows, respond=environment.respond)
    return Kept(traj, counts, environment, compiled)


def assert_no_gap(params, traj, config=CONFIG):
    """The whole conversation scored at once gives the log-probs that its turns were sampled with."""
    logp = jax.jit(make_policy(config))(params, {}, traj).logp
    assert float(jnp.where(traj.mask, jnp.abs(logp - traj.logp), 0.0).max()) <= 1e-5


def assert_same(traj, other, config=CONFIG):
    for name in ("inputs", "actions", "mask", "segments", "positions", "rewards", "step_ends", "terminated"):
        np.testing.assert_array_equal(getattr(traj, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(traj.logp, other.logp, rtol=0, atol=bounds.of_logp(config, traj))


# ----------------------------------------------------------------------------------------------------- what is recorded


def test_rows_are_what_was_said(kept, rows):
    """Every field rebuilt from the prompts, the turns and the observations, in the order in which they were said."""
    traj, counts, environment, _ = kept
    assert traj.mask.shape == (len(LENGTHS) * SAMPLING.n, CONTEXT - 1)
    kinds = set()
    for b in range(len(traj.mask)):
        prompt = rows.tokens[b // SAMPLING.n][rows.mask[b // SAMPLING.n]].tolist()
        ids, chosen, rewards, ends = list(prompt), [False] * len(prompt), {}, []
        dialogue = environment.said[b]
        for turn, observation in dialogue:
            ids += turn.tokens
            chosen += [True] * len(turn.tokens)
            ends.append(len(ids) - 2)  # the decision that chose the last token
            rewards[ends[-1]] = observation.reward
            assert turn.terminated == (turn.tokens[-1] in STOP)
            assert turn.terminated or len(turn.tokens) == SAMPLING.max_tokens or len(ids) == CONTEXT
            if turn is not dialogue[-1][0]:
                ids += observation.tokens
                chosen += [False] * len(observation.tokens)
        T = len(ids) - 1
        np.testing.assert_array_equal(traj.inputs[b, :T], ids[:-1])
        np.testing.assert_array_equal(traj.actions[b, :T], ids[1:])
        np.testing.assert_array_equal(traj.mask[b], np.pad(chosen[1:], (0, CONTEXT - 1 - T)))
        np.testing.assert_array_equal(traj.segments[b], np.arange(CONTEXT - 1) < T)
        np.testing.assert_array_equal(np.flatnonzero(traj.step_ends[b]), ends)
        want = np.zeros(CONTEXT - 1)
        want[list(rewards)] = list(rewards.values())
        np.testing.assert_allclose(traj.rewards[b], want, rtol=1e-6)
        last = dialogue[-1][1]
        out_of_turns = not (last.terminated or last.truncated) and len(dialogue) == 5
        out_of_context = not (last.terminated or last.truncated or out_of_turns)
        assert not out_of_context or len(ids) + len(last.tokens) >= CONTEXT
        assert np.flatnonzero(traj.terminated[b]).tolist() == ends[-1:] * last.terminated
        assert np.flatnonzero(traj.truncated[b]).tolist() == ends[-1:] * (not last.terminated)
        assert (counts.out_of_turns[b], counts.out_of_context[b]) == (out_of_turns, out_of_context)
        assert (counts.turns[b], counts.observed[b]) == (len(ends), chosen.count(False) - len(prompt))
        kinds.add((last.terminated, last.truncated, out_of_turns, out_of_context))
    assert len(kinds) == 4
    np.testing.assert_array_equal(traj.group, np.repeat(rows.number, SAMPLING.n))
    np.testing.assert_array_equal(np.where(traj.mask, traj.temperature, 1.0), 1.0)


@pytest.mark.parametrize("max_concurrent", [None, pytest.param(2, marks=pytest.mark.nightly)])
def test_the_first_turn_is_the_completion_that_the_sampler_samples(params, monkeypatch, max_concurrent):
    """Also of prompts far narrower than their columns: a batch is padded to the longest prompt of the data set."""
    monkeypatch.setattr(conversations, "INITIAL_COLUMNS", 8)
    rows = make_rows([2, 4, 1, 3], start=40, width=CONTEXT)
    sampling = SAMPLING.replace(max_concurrent=max_concurrent)
    traj, counts = converse(params, rows, sampling, max_turns=1)
    whole = sample(LM, params, {}, rows, sampling, SEED, STEP)
    assert (counts.turns == 1).all()
    np.testing.assert_array_equal(traj.actions[traj.mask], whole.actions[whole.mask])
    np.testing.assert_allclose(traj.logp[traj.mask], whole.logp[whole.mask], atol=bounds.of_logp(CONFIG, whole))


def test_token_k_has_the_key_of_k_whatever_stands_between(params, rows, kept):
    """Nothing but the logits and the k-th uniform number decides: float64 draws the same tokens."""
    traj = kept.traj
    prompt, completion = np.repeat(rows.number, SAMPLING.n), np.tile(np.arange(4, dtype=np.int32), len(LENGTHS))
    keys = row_keys(jnp.int32(SEED), jnp.int32(STEP), jnp.asarray(prompt), jnp.asarray(completion))
    logits = np.float64(logits_of(params, traj))
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    cdf = np.cumsum(probs, axis=-1) / probs.sum(axis=-1, keepdims=True)
    k = np.cumsum(traj.mask, axis=1) - 1
    uniform = jax.vmap(lambda position: token_uniforms(keys, position), in_axes=1, out_axes=1)(jnp.asarray(k))
    uniform = np.float64(uniform)
    drawn = (cdf <= uniform[..., None]).sum(axis=-1)
    clear = np.abs(cdf[..., :-1] - uniform[..., None]).min(axis=-1) > 1e-5
    compared = np.asarray(traj.mask) & clear
    assert compared.sum() > 0.99 * traj.mask.sum()
    np.testing.assert_array_equal(np.where(compared, traj.actions, 0), np.where(compared, drawn, 0))


# ----------------------------------------------------------------------------------------------------------- every mode


@pytest.mark.parametrize(
    ("cache", "max_concurrent"),
    [("kept", None), ("prefill", None), ("kept", 5), pytest.param("prefill", 5, marks=pytest.mark.nightly)],
)
def test_every_mode_samples_the_same(params, rows, kept, cache, max_concurrent, monkeypatch):
    if max_concurrent:  # caches that are too small at first, and grow
        monkeypatch.setattr(conversations, "INITIAL_COLUMNS", CONTEXT - 16)
    environment = Environment()
    sampling = SAMPLING.replace(max_concurrent=max_concurrent)
    traj, counts = converse(params, rows, sampling, respond=environment.respond, cache=cache)
    assert_same(traj, kept.traj)
    jax.tree.map(np.testing.assert_array_equal, counts, kept.counts)
    assert_no_gap(params, traj)
    assert max(map(len, environment.batches)) <= (max_concurrent or len(traj.mask))
    first_batch = environment.batches[0]
    assert 0 < len(first_batch) < (max_concurrent or len(traj.mask))  # some are answered while others pause


def test_settings_of_a_draw(params, rows):
    """Truncation with its support, a minimum length and a stop string, each of them of a turn."""
    automaton = np.zeros((2, CONFIG.vocab_size), np.int32)
    automaton[0, 10:20] = 1  # a token of 10 to 19 and then one of 20 to 29 ends a turn
    automaton[1, 10:20], automaton[1, 20:30] = 1, -1
    sampling = SAMPLING.replace(
        temperature=1.2, top_p=0.9, top_k=20, support=20, min_tokens=2, stop_strings=jnp.asarray(automaton)
    )
    trajs = []
    for cache in ("kept", "prefill"):
        environment = Environment()
        traj, _ = converse(params, rows, sampling, respond=environment.respond, cache=cache)
        trajs.append(traj)
        turns = [turn for said in environment.said.values() for turn, _ in said]
        by_stop = [turn.tokens for turn in turns if turn.terminated and turn.tokens[-1] not in STOP]
        assert by_stop
        for turn in turns:
            pairs = [
                a in range(10, 20) and b in range(20, 30) for a, b in zip(turn.tokens, turn.tokens[1:], strict=False)
            ]
            assert not any(pairs[:-1])
            assert not set(turn.tokens[:-1]) & set(STOP)
            assert len(turn.tokens) > 2 or turn.tokens[-1] not in STOP
            assert turn.terminated == (turn.tokens[-1] in STOP or bool(pairs and pairs[-1]))
        assert_no_gap(params, traj)
    assert_same(*trajs)
    np.testing.assert_array_equal(*(traj.support for traj in trajs))


@pytest.mark.nightly
def test_a_repetition_penalty_remembers_observations_too(params, rows):
    sampling = SAMPLING.replace(n=1, temperature=0.0, repetition_penalty=1.7, logp="policy", max_concurrent=2)
    traj, counts = converse(params, rows, sampling)
    assert counts.observed.sum() > 20
    inputs, actions = np.asarray(traj.inputs), np.asarray(traj.actions)
    logits = np.float64(logits_of(params, traj))
    for b, t in zip(*np.nonzero(traj.mask), strict=True):
        seen = np.unique(inputs[b, : t + 1])
        row = logits[b, t].copy()
        row[seen] = np.where(row[seen] > 0, row[seen] / 1.7, row[seen] * 1.7)
        second, best = np.sort(row)[-2:]
        assert row.argmax() == actions[b, t] or best - second < 1e-4


def test_a_mixture_records_its_experts(rows):
    """Of conversations that end while the cache has fewer columns than a row may have: 256 of 300."""
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=16, layers=(1,), norm_topk_prob=True)
    config = dataclasses.replace(CONFIG, moe=moe)
    params = policy.init(config, jax.random.key(0))
    sampling = SAMPLING.replace(n=1, max_concurrent=4)
    traj, _ = converse(params, rows, sampling, decoder.language_model(config), max_context=300)
    assert traj.routing.shape == (*traj.mask.shape, 1, 2)
    assert_no_gap(params, traj, config)
    swapped = traj.replace(routing=3 - traj.routing)  # the experts matter: others give other log-probs
    logp = jax.jit(make_policy(config))(params, {}, swapped).logp
    assert float(jnp.where(traj.mask, jnp.abs(logp - traj.logp), 0.0).max()) > 1e-3


@pytest.mark.nightly
def test_batch_invariant_conversations_have_the_policys_bits(rows):
    config = dataclasses.replace(CONFIG, head_dim=16, batch_invariant=True)
    params = policy.init(config, jax.random.key(0))
    lm = decoder.language_model(config)
    trajs = [converse(params, rows, SAMPLING.replace(n=2), lm, cache=cache)[0] for cache in ("kept", "prefill")]
    jax.tree.map(np.testing.assert_array_equal, *trajs)
    logp = jax.jit(make_policy(config))(params, {}, trajs[0]).logp
    np.testing.assert_array_equal(np.where(trajs[0].mask, logp, 0.0), np.where(trajs[0].mask, trajs[0].logp, 0.0))


def test_rows_may_be_sharded(params, rows, kept):
    mesh = meshes.make_mesh(data=2, fsdp=4)
    config = dataclasses.replace(CONFIG, hidden_sharding=meshes.hidden_sharding(mesh))
    places = meshes.param_shardings(mesh, policy.logical_axes(CONFIG, params), params)
    traj, _ = converse(jax.device_put(params, places), rows, lm=decoder.language_model(config))
    assert_same(traj, kept.traj)


# ------------------------------------------------------------------------------------------------------- compilations


def test_turns_of_any_number_and_length_run_in_a_few_programs(params, kept):
    """Chunks of at most 16 tokens are five programs, the prompts another one; decoding is one."""
    assert kept.compiled["decode_turns"] == 1
    assert 3 <= kept.compiled["read_tokens"] <= 6
    with count_compilations() as compiled:
        converse(params, make_rows([5, 3, 1, 2, 2, 7], start=70, width=max(LENGTHS)), max_turns=3)
    assert compiled["decode_turns"] == compiled["admit"] == compiled["empty_slots"] == 0
    assert compiled["read_tokens"] <= 6 - kept.compiled["read_tokens"]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 0}, "legal: at least 1 turn"),
        ({"max_context": max(LENGTHS)}, f"{max(LENGTHS) + 1} tokens for the longest prompt"),
        ({"cache": "none"}, "legal: 'kept' and 'prefill'"),
        ({"sampling": SAMPLING.replace(stop_after=1)}, "sampling.stop_after of None"),
        ({"sampling": SAMPLING.replace(top_k=3)}, "sampling.top_k"),
    ],
)
def test_settings_that_are_refused(params, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        converse(params, rows, **settings)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda turns: [], "0 observations for"),
        (lambda turns: [([], 0.0) for _ in turns], "gave tuple for row"),
        (lambda turns: [Observation("text", 0.0) for _ in turns], "tokens that are no list of ids"),
        (lambda turns: [Observation([1.5], 0.0) for _ in turns], "tokens that are no list of ids"),
        (lambda turns: [Observation([-1], 0.0) for _ in turns], "tokens that are no list of ids"),
        (lambda turns: [Observation([53], 0.0) for _ in turns], "legal: ids below 53"),
    ],
)
def test_an_environment_that_breaks_the_contract(params, rows, answers, message):
    with pytest.raises(ValueError, match=message):
        converse(params, rows, SAMPLING, respond=answers)
