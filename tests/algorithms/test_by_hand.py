"""Losses of whole algorithms against the papers' sums, written as loops over rows and decisions in float64.

The gradient is compared with central differences of the same sums, in which what a paper holds constant keeps the value
it has at the point.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.ops import ratios
from rljax.train.objective import policy_objective
from rljax.types import Batch, PolicyOutput, Trajectory

B, T, LONGEST = 6, 7, 11
draw = np.random.default_rng(4)
MASK = draw.random((B, T)) < 0.7
MASK[2] = False  # a row without a decision
ADVANTAGE = np.array([1.3, -0.7, 0.5, -1.1, 0.4, -0.6])
OLD = np.log(draw.uniform(0.1, 0.9, (B, T)))
POLICY = OLD + 0.35 * draw.normal(size=(B, T))
SAMPLER = OLD + 0.5 * draw.normal(size=(B, T))
ENTROPY = draw.uniform(0.0, 2.0, (B, T))
ROWS = [(ADVANTAGE[b], np.flatnonzero(MASK[b]), b) for b in range(B) if MASK[b].any()]
TOKENS = MASK.sum()


def clip(x, low, high):
    return min(max(x, low), high)


def ppo_term(ratio, advantage, low, high):
    return max(-ratio * advantage, -clip(ratio, 1 - low, 1 + high) * advantage)


def over_tokens(term):
    """Mean over all tokens of term(x, fixed, row, t, advantage)."""
    return lambda x, fixed: sum(term(x, fixed, b, t, adv) for adv, own, b in ROWS for t in own) / TOKENS


def over_rows(term):
    """Mean over the rows that have a decision of the mean over their tokens."""
    return lambda x, fixed: np.mean([np.mean([term(x, fixed, b, t, adv) for t in own]) for adv, own, b in ROWS])


def of_rows(term):
    """Mean over the rows that have a decision of term(x, fixed, row, own columns, advantage)."""
    return lambda x, fixed: np.mean([term(x, fixed, b, own, adv) for adv, own, b in ROWS])


def grpo_term(x, fixed, b, t, adv):
    return ppo_term(np.exp(x[b, t] - OLD[b, t]), adv, 0.2, 0.2)


def dr_grpo(x, fixed):
    return sum(grpo_term(x, fixed, b, t, adv) for adv, own, b in ROWS for t in own) / (len(ROWS) * LONGEST)


def cispo_term(x, fixed, b, t, adv):
    return -clip(np.exp(fixed[b, t] - OLD[b, t]), 0.8, 1.4) * adv * x[b, t]


def sapo_term(x, fixed, b, t, adv):
    tau = 1.0 if adv > 0 else 1.6
    return -adv * 4 / tau / (1 + np.exp(-tau * (np.exp(x[b, t] - OLD[b, t]) - 1)))


def gspo_term(x, fixed, b, own, adv):
    return ppo_term(np.exp((x[b, own] - OLD[b, own]).mean()), adv, 0.05, 0.1)


def gspo_token_term(x, fixed, b, t, adv):
    of_row = np.exp((fixed[b, MASK[b]] - OLD[b, MASK[b]]).mean())
    return ppo_term(of_row * np.exp(x[b, t] - fixed[b, t]), adv, 0.05, 0.1)


def luspo_term(x, fixed, b, own, adv):
    return len(own) * gspo_term(x, fixed, b, own, adv)


def gmpo_term(x, fixed, b, own, adv):
    d = [x[b, t] - OLD[b, t] for t in own]
    d = [min(one, 0.3) if adv > 0 else max(one, -0.2) for one in d]
    return -adv * np.exp(np.mean(d))


def authors_gmpo_term(x, fixed, b, own, adv):
    """As the paper's authors have it: the larger of -sgn(Â) log ρ and its value clipped to one range of both sides."""
    sign = -1 if adv >= 0 else 1
    signed = [sign * (x[b, t] - OLD[b, t]) for t in own]
    return -adv * np.exp(np.mean([sign * max(one, clip(one, -0.2, 0.2)) for one in signed]))


def rloo_term(x, fixed, b, own, adv):
    return ppo_term(np.prod(np.exp(x[b, own] - OLD[b, own])), adv, 0.3, 0.4)


def opmd_term(x, fixed, b, own, adv):
    total = (x[b, own] - OLD[b, own]).sum()
    return -adv * total + 0.5 * 0.3 * total**2


def topr_term(x, fixed, b, own, adv):
    ratio = np.prod(np.exp(fixed[b, own] - SAMPLER[b, own]))
    return -(1.0 if adv > 0 else min(ratio, 1.0)) * adv * x[b, own].sum()


def sampler_weight(b, t):
    return np.exp(OLD[b, t] - SAMPLER[b, t])


def tis_term(x, fixed, b, t, adv):
    return min(sampler_weight(b, t), 1.3) * grpo_term(x, fixed, b, t, adv)


def icepop_term(x, fixed, b, t, adv):
    weight = sampler_weight(b, t)
    return weight * grpo_term(x, fixed, b, t, adv) if 0.7 <= weight <= 1.4 else 0.0


def tis_of_row_term(x, fixed, b, t, adv):
    weight = np.prod([sampler_weight(b, s) for s in np.flatnonzero(MASK[b])])
    return min(weight, 1.3) * grpo_term(x, fixed, b, t, adv)


def mis_of_row_term(x, fixed, b, t, adv):
    weight = np.prod([sampler_weight(b, s) for s in np.flatnonzero(MASK[b])]) ** (1 / MASK[b].sum())
    return weight * grpo_term(x, fixed, b, t, adv) if 0.9 <= weight <= 1.2 else 0.0


def uncertain_term(x, fixed, b, t, adv):
    """The divisor counts every token, also those left out."""
    return grpo_term(x, fixed, b, t, adv) if ENTROPY[b, t] >= np.quantile(ENTROPY[MASK], 0.6) else 0.0


def fresh_term(x, fixed, b, t, adv):
    stale = adv < 0 and (SAMPLER[b, MASK[b]] - fixed[b, MASK[b]]).mean() > 0.05
    return 0.0 if stale else grpo_term(x, fixed, b, t, adv)


CASES = {
    "grpo": (a.grpo(), over_rows(grpo_term)),
    "dapo": (a.dapo(0.2, 0.2), over_tokens(grpo_term)),
    "dr_grpo": (a.dr_grpo(float(LONGEST)), dr_grpo),
    "cispo": (a.cispo(0.8, 1.4), over_tokens(cispo_term)),
    "sapo": (a.sapo(1.0, 1.6), over_rows(sapo_term)),
    "gspo": (a.gspo(0.05, 0.1), of_rows(gspo_term)),
    "gspo_token": (a.gspo_token(0.05, 0.1), over_rows(gspo_token_term)),
    "luspo": (a.luspo(0.05, 0.1), of_rows(luspo_term)),
    "gmpo": (a.gmpo(0.2, 0.3), of_rows(gmpo_term)),
    "gmpo of its authors": (a.gmpo(0.2, 0.2), of_rows(authors_gmpo_term)),
    "rloo": (a.rloo(0.3, 0.4), of_rows(rloo_term)),
    "opmd": (a.opmd(0.3), of_rows(opmd_term)),
    "topr": (a.topr(), of_rows(topr_term)),
    "truncated importance weights": (a.truncate_is(a.grpo(), 1.3), over_rows(tis_term)),
    "truncated weights of answers": (a.truncate_is(a.grpo(), 1.3, ratios.sequence_product), over_rows(tis_of_row_term)),
    "masked importance weights": (a.mask_is(a.grpo(), 0.7, 1.4), over_rows(icepop_term)),
    "masked weights of answers": (
        a.mask_is(a.grpo(), 0.9, 1.2, ratios.sequence_geometric_mean),
        over_rows(mis_of_row_term),
    ),
    "only high entropy": (a.high_entropy_mask(a.dapo(0.2, 0.2), 0.4), over_tokens(uncertain_term)),
    "no stale failures": (a.off_policy_sequence_mask(a.grpo(), 0.05), over_rows(fresh_term)),
}


def value_and_gradient(algorithm):
    """Through the objective, as `update` would, of a policy that is its own log-probs."""

    def policy(params, frozen, traj):
        return PolicyOutput(logp=params, entropy=jnp.asarray(ENTROPY))

    nothing = jnp.zeros((B, T), jnp.int32)
    facts = {"logp": SAMPLER, "old_logp": OLD, "ref_logp": OLD - 0.5}  # the reference plays no part here
    facts = {name: jnp.asarray(x) for name, x in facts.items()}
    traj = Trajectory(inputs=nothing, actions=nothing, mask=jnp.asarray(MASK), **facts)
    batch = Batch(traj, jnp.asarray(np.where(MASK, ADVANTAGE[:, None], 0.0)), traj.mask)
    objective = policy_objective(policy, algorithm)
    batch = objective.prepare(jnp.asarray(POLICY), {}, batch, jax.random.key(0))
    return jax.value_and_grad(lambda x: objective.loss(x, {}, batch)[0])(jnp.asarray(POLICY))


def differences(loss):
    slope = np.zeros((B, T))
    for place in np.ndindex(B, T):
        step = np.zeros((B, T))
        step[place] = 1e-6
        slope[place] = (loss(POLICY + step, POLICY) - loss(POLICY - step, POLICY)) / 2e-6
    return slope


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_paper(name):
    algorithm, loss = CASES[name]
    with jax.enable_x64(True):
        value, gradient = value_and_gradient(algorithm)
    want = differences(loss)
    np.testing.assert_allclose(value, loss(POLICY, POLICY), rtol=1e-10)
    np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-9)
    assert np.abs(want).max() > 0.01


def test_the_penalty_of_mirror_descent_is_shown_before_its_coefficient():
    batch = Batch(text(old_logp=OLD), jnp.asarray(MASK * ADVANTAGE[:, None]), jnp.asarray(MASK))
    shown = [a.opmd(tau).loss(PolicyOutput(jnp.float32(POLICY)), batch)[1]["old_policy_penalty"] for tau in (0.3, 0.01)]
    np.testing.assert_array_equal(*shown)
    own = ROWS[0][1]
    want = 0.5 * (POLICY - OLD)[0, own].sum() ** 2
    np.testing.assert_allclose(np.asarray(shown[0])[0, own].sum(), want, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- credit


def text(**facts):
    """Trajectory of float32 facts with an outcome on the last decision of each row."""
    nothing, rewards = jnp.zeros((B, T), jnp.int32), np.zeros((B, T))
    for adv, own, b in ROWS:
        rewards[b, own[-1]] = 2 * adv
    facts = {"logp": SAMPLER, "rewards": rewards, **facts}
    facts = {name: jnp.asarray(x, None if x.dtype == bool else jnp.float32) for name, x in facts.items()}
    group = jnp.asarray([4, 1, 1, 4, 1, 4])
    return Trajectory(inputs=nothing, actions=nothing, mask=jnp.asarray(MASK), group=group, **facts)


def whitened(x):
    return (x - x[MASK].mean()) / np.sqrt(x[MASK].var(ddof=1) + 1e-8)


def test_vapo_looks_further_in_longer_answers():
    values = draw.normal(size=(B, T + 1))
    values[:, -1] = 0.0
    traj = text(values=values)
    want, targets = np.zeros((B, T)), np.zeros((B, T))
    for adv, own, b in ROWS:
        lam = max(0.0, 1 - 1 / (0.3 * len(own)))
        for i, t in enumerate(own):
            following = [*values[b, own[i + 1 :]], 0.0]
            here = [*values[b, own[i:]]]
            errors = [after - before for after, before in zip(following, here, strict=True)]
            errors[-1] += 2 * adv
            want[b, t] = sum(lam**k * error for k, error in enumerate(errors))
            targets[b, t] = 2 * adv
    batch = a.vapo(alpha=0.3).credit(traj, {})
    assert len({len(own) for _, own, _ in ROWS}) > 2
    np.testing.assert_allclose(np.asarray(batch.advantages)[MASK], whitened(want)[MASK], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(batch.returns)[MASK], targets[MASK], rtol=1e-5)


def test_distillation_wants_more_of_what_the_teacher_finds_likelier():
    teacher = OLD + draw.normal(size=(B, T))
    traj = text(teacher_logp=teacher, old_logp=OLD)
    plain, taught = (algorithm.credit(traj, {}).advantages for algorithm in (a.grpo(), a.distill(a.grpo(), 0.3)))
    np.testing.assert_allclose((taught - plain)[MASK], 0.3 * (teacher - OLD)[MASK], rtol=1e-4, atol=1e-5)


def test_answers_that_were_cut_are_compared_with_and_neither_learned_from_nor_counted():
    cut = np.zeros((B, T), bool)
    cut[1, np.flatnonzero(MASK[1])[-1]] = True
    cut[3, np.flatnonzero(~MASK[3])[0]] = True  # outside the mask: garbage
    traj = text(truncated=cut)
    plain, batch = (algorithm.credit(traj, {}) for algorithm in (a.dapo(), a.filter_overlong(a.dapo())))
    left = MASK & (np.arange(B) != 1)[:, None]
    np.testing.assert_array_equal(batch.mask, left)
    np.testing.assert_array_equal(np.asarray(batch.advantages)[left], np.asarray(plain.advantages)[left])
    weight = policy_objective(lambda params, frozen, traj: None, a.dapo()).prepare({}, {}, batch, None).weight
    np.testing.assert_allclose(weight, left / left.sum(), rtol=1e-6)
