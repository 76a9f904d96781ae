"""Policy-gradient estimators against the exact gradient, every trajectory enumerated: their means and their variances.

The 2x3 maze from its upper left corner, three steps that cost 1 each, in a wind that blows one down a third of the
time. Policies choose by sixths, so a batch of (6 · 3)^3 rows holds every trajectory as often as it happens: a mean over
it is an expectation, baselines and whitening see infinitely many rows, and each row's share of the gradient is one
sample. Credit, loss and weights are those that train. The truth is `jax.grad` of a value found backwards through time,
and sums in numpy.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.algorithms.reinforce import batch_mean_baseline, leave_one_out_baseline, no_baseline
from rljax.envs.maze import make_maze, maze_mdp
from rljax.envs.tabular import TabularMDP, state_values
from rljax.train.objective import policy_objective
from rljax.types import Trajectory
from tests.algorithms.tiny import asked_for, table_policy

DOWN, NEVER = 1, float("inf")
CALM = jax.device_get(maze_mdp(make_maze().params, 1.0))
NEXT, ENDS = CALM.P.argmax(axis=2), ~CALM.P.any(axis=(1, 2))
PAY = np.where(ENDS[:, None], 0.0, np.float64(CALM.R) - 1.0)
WIND = ([DOWN] * 4, range(4), range(4))  # what becomes of each action, a third of the time each
LANDS, PAYS = (np.stack([x[:, list(moved)] for moved in WIND]) for x in (NEXT, PAY))
P, R = (np.eye(6)[LANDS] * ~ENDS[:, None, None]).mean(axis=0), PAYS.mean(axis=0)
NOTHING = np.zeros(6)

PI = np.array([[1, 1, 1, 3], [1, 2, 1, 2], [2, 1, 1, 2], [2, 1, 1, 2], [3, 1, 1, 1], [2, 1, 1, 2]]) / 6
MU = np.array([[1, 2, 1, 2], [2, 1, 2, 1], [2, 1, 1, 2], [1, 1, 2, 2], [1, 2, 1, 2], [2, 1, 1, 2]]) / 6


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def values(logits, tail=NOTHING, gamma=1.0, steps=3):
    """V [steps + 1, S] by the time that has passed. `tail`: what the last states are worth, held fixed."""
    pi, found = jax.nn.softmax(logits), [jnp.asarray(tail)]
    for _ in range(steps):
        found.append((pi * (R + gamma * P @ found[-1])).sum(axis=1))
    return jnp.stack(found[::-1])


def slope(tail=NOTHING, gamma=1.0, steps=3, start=0):
    """∇J [S A]."""
    return np.asarray(jax.grad(lambda logits: values(logits, tail, gamma, steps)[0, start])(jnp.log(PI)))


def advantages(gamma=1.0):
    """Q - V [steps, S, A] of π."""
    V = np.asarray(values(jnp.log(PI), gamma=gamma))
    return np.stack([R + gamma * P @ after - now[:, None] for now, after in itertools.pairwise(V)])


def visited(policy):
    """Probability [steps, S] of deciding there at that time."""
    found = [np.eye(6)[0]]
    for _ in range(2):
        found.append(np.einsum("s,sa,sat->t", found[-1], policy, P))
    return np.stack(found) * ~ENDS


def every_trajectory(policy, tail=NOTHING, steps=3, start=0):
    """Each as often as it happens by `policy`; with log-probs of it and of π, and values of π."""
    digits = np.stack(np.unravel_index(np.arange(18**steps), (6, 3) * steps), axis=1).reshape(-1, steps, 2)
    choices = np.stack([np.repeat(np.arange(4), row) for row in np.rint(6 * policy).astype(int)])
    s, taken = np.full(len(digits), start), []
    for t in range(steps):
        action, wind = choices[s, digits[:, t, 0]], digits[:, t, 1]
        after = np.where(ENDS[s], s, LANDS[wind, s, action])
        taken.append((s, action, PAYS[wind, s, action], after))
        s = after
    now, action, reward, after = (np.stack(x, axis=1) for x in zip(*taken, strict=True))
    mask, ended, time = ~ENDS[now], ENDS[after], np.arange(steps)
    V = np.asarray(values(jnp.log(PI), tail, steps=steps))
    V_now, V_after = V[time, now], V[time + 1, after]
    facts = {
        "rewards": np.where(mask, reward, 0.0),
        "old_logp": np.log(PI)[now, action],
        "values": np.concatenate([V_now, V_after[:, -1:]], axis=1),
        "final_values": V_after,
        "terminated": mask & ended,
        "truncated": mask & ~ended & (time == steps - 1),
        "temperature": np.ones(now.shape),
        "group": np.zeros(len(now), int),
    }
    return jax.tree.map(jnp.asarray, Trajectory(now, action, np.log(policy)[now, action], mask, **facts))


def samples(algorithm, traj, given=None):
    """What each row alone says of the gradient, [N S A]; their mean is the batch's. `given`: other advantages."""
    objective, params = policy_objective(table_policy, algorithm), {"table": jnp.log(PI), "values": jnp.zeros(6)}
    batch = algorithm.credit(asked_for(algorithm, traj), {})
    batch = batch if given is None else batch.replace(advantages=given)
    batch = objective.prepare(params, {}, batch, jax.random.key(0))
    rows = jax.tree.map(lambda x: x[:, None], batch)
    one = jax.grad(lambda params, row: objective.loss(params, {}, row)[0])
    return -len(traj.mask) * np.asarray(jax.vmap(one, (None, 0))(params, rows)["table"])


def by_hand(traj, psi):
    """Σ_t ∇ log π(a_t | s_t) Ψ_t of each row, [N S A]."""
    out, rows = np.zeros((len(psi), 6, 4)), np.arange(len(psi))
    for s, action, chosen, weight in zip(
        *(np.asarray(x).T for x in (traj.inputs, traj.actions, traj.mask, psi)), strict=True
    ):
        out[rows, s] += (chosen * weight)[:, None] * (np.eye(4)[action] - PI[s])
    return out


def gae(traj, lam):
    """δ_t + λ δ_{t+1} + ... in numpy."""
    V, mask, out = np.asarray(traj.values), np.asarray(traj.mask), np.zeros(traj.mask.shape)
    following = np.where(traj.truncated, traj.final_values, V[:, 1:])
    delta = traj.rewards + np.where(traj.terminated, 0.0, following) - V[:, :-1]
    for t in reversed(range(mask.shape[1])):
        later = out[:, t + 1] if t + 1 < mask.shape[1] else 0.0
        out[:, t] = mask[:, t] * (delta[:, t] + lam * later)
    return out


def variance(found):
    """Of one sample, summed over the parameters."""
    return ((found - found.mean(axis=0)) ** 2).sum(axis=(1, 2)).mean()


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())


def apart(got, want):
    assert np.abs(got - want).max() > 0.02 * np.abs(want).max()


def psi(traj):
    """Ψ_t of the policy gradient: (algorithm, its advantages if not its own, the same in numpy, whitened or not)."""
    r, mask, time = np.asarray(traj.rewards), np.asarray(traj.mask), np.arange(3)
    to_go = np.cumsum(r[:, ::-1], axis=1)[:, ::-1]
    exact = advantages()[time, traj.inputs, traj.actions]
    column = (to_go * mask).sum(axis=0) / mask.sum(axis=0)
    return {
        "return": (a.reinforce(no_baseline), None, np.broadcast_to(to_go[:, :1], r.shape), False),
        "return - mean": (a.reinforce(batch_mean_baseline), None, to_go[:, :1] - to_go[:, :1].mean() + 0 * r, False),
        "reward-to-go": (a.reinforce_to_go(no_baseline), None, to_go, False),
        "reward-to-go - mean of the column": (a.reinforce_to_go(batch_mean_baseline), None, to_go - column, False),
        "reward-to-go - V": (a.vpg(1.0, 1.0), None, gae(traj, 1.0), True),
        "GAE": (a.vpg(1.0, 0.5), None, gae(traj, 0.5), True),
        "TD residual": (a.vpg(1.0, 0.0), None, gae(traj, 0.0), True),
        "advantage": (a.reinforce(), jnp.asarray(exact), exact, False),
    }


@pytest.fixture(scope="module")
def drawn():
    with jax.enable_x64(True):
        return every_trajectory(PI)


def unshrunk(found, traj, whitened):
    """Times what those that whiten divide by: E[n], decisions an episode, and σ of Ψ."""
    mask = np.asarray(traj.mask)
    return found if whitened is None else found * mask.sum(axis=1).mean() * np.sqrt(whitened[mask].var(ddof=1) + 1e-8)


def test_every_psi_is_unbiased_and_each_knows_more_than_the_one_before(drawn):
    """The variances are those of sums in numpy. Whitened gradients are smaller by E[n] σ_Ψ: here 9.6, 7.2, 6.4."""
    variances = {}
    for name, (algorithm, given, numbers, whitened) in psi(drawn).items():
        found = unshrunk(samples(algorithm, drawn, given), drawn, numbers if whitened else None)
        close(found.mean(axis=0), slope())
        variances[name] = variance(found)
        np.testing.assert_allclose(variances[name], variance(by_hand(drawn, numbers)), rtol=1e-7)
    order = list(variances.values())
    assert variances["return"] > variances["reward-to-go"] > variances["reward-to-go - mean of the column"]
    assert order[3:] == sorted(order[3:], reverse=True)


def test_a_critic_that_is_wrong_biases_residuals_and_not_returns(drawn):
    traj = drawn.replace(values=0.2 * drawn.values)
    for lam, check in ((1.0, close), (0.5, apart), (0.0, apart)):
        check(unshrunk(samples(a.vpg(1.0, lam), traj), traj, gae(traj, lam)).mean(axis=0), slope())


def test_an_episode_cut_by_time_is_worth_what_its_last_state_is():
    """V by a linear solve of the endless process. Treated as an end, the cut is another objective."""
    endless = state_values(TabularMDP(jnp.asarray(P), jnp.asarray(R), 1.0), jnp.asarray(PI))
    V = values(jnp.log(PI), endless)
    close(V, jnp.broadcast_to(endless, V.shape))
    traj = every_trajectory(PI, np.asarray(endless))
    for lam in (1.0, 0.5, 0.0):
        close(unshrunk(samples(a.vpg(1.0, lam), traj), traj, gae(traj, lam)).mean(axis=0), slope(endless))
    ended = traj.replace(final_values=None, values=traj.values.at[:, -1].set(0.0))
    apart(unshrunk(samples(a.vpg(1.0, 1.0), ended), ended, gae(traj, 1.0)).mean(axis=0), slope(endless))


def test_a_discount_leaves_out_its_power_in_front_of_each_decision(drawn):
    """Decision t counts in full, not γ^t of it: what comes out is no gradient of the discounted return."""
    found = samples(a.reinforce_to_go(no_baseline, 0.8), drawn).mean(axis=0)
    close(found, np.einsum("ts,sa,tsa->sa", visited(PI), PI, advantages(gamma=0.8)))
    apart(found, slope(gamma=0.8))


def test_importance_weights_of_whole_episodes_are_unbiased_under_another_policy():
    traj = every_trajectory(MU)
    for baseline in (no_baseline, batch_mean_baseline):
        close(samples(a.off_policy_pg(baseline=baseline), traj).mean(axis=0), slope())
    apart(samples(a.reinforce(no_baseline), traj).mean(axis=0), slope())
    apart(samples(a.off_policy_pg(cap=1.0, baseline=no_baseline), traj).mean(axis=0), slope())


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_v_trace_is_unbiased_on_policy_and_else_but_for_the_states(drawn, lam):
    """Without bounds each decision is right, in the states that the *other* policy visits; bounds bias that too."""
    unbounded = a.vtrace(1.0, lam, NEVER, NEVER, NEVER)
    for algorithm in (unbounded, a.vtrace(1.0, lam)):
        close(samples(algorithm, drawn).mean(axis=0) * drawn.mask.sum(axis=1).mean(), slope())
    traj = every_trajectory(MU)
    of_states = np.einsum("ts,sa,tsa->sa", visited(MU), PI, advantages())
    length = traj.mask.sum(axis=1).mean()
    close(samples(unbounded, traj).mean(axis=0) * length, of_states)
    apart(of_states, slope())
    apart(samples(a.vtrace(1.0, lam), traj).mean(axis=0) * length, of_states)


@pytest.fixture(scope="module")
def pairs():
    """All pairs [M 2 T] of episodes of two steps from beside the goal, and their probabilities; equal ones are one."""
    with jax.enable_x64(True):
        traj = every_trajectory(PI, steps=2, start=1)
        content = np.stack([np.where(traj.mask, x, -1.0) for x in (traj.inputs, traj.actions, traj.rewards)], axis=1)
        _, first, count = np.unique(content, axis=0, return_index=True, return_counts=True)
        i, j = (x.ravel() for x in np.meshgrid(first, first))
        traj = jax.tree.map(lambda x: jnp.stack([x[i], x[j]], axis=1), traj)
        return traj, np.outer(count, count).ravel() / count.sum() ** 2


def over_pairs(algorithm, pairs):
    """E of the gradient of a batch of two rows."""
    traj, probability = pairs
    objective = policy_objective(table_policy, algorithm)

    def gradient(params, traj):
        batch = objective.prepare(params, {}, algorithm.credit(asked_for(algorithm, traj), {}), jax.random.key(0))
        return -jax.grad(lambda params: objective.loss(params, {}, batch)[0])(params)["table"]

    params = {"table": jnp.log(PI), "values": jnp.zeros(6)}
    return np.einsum("m,msa->sa", probability, jax.vmap(gradient, (None, 0))(params, traj))


def test_in_a_batch_of_two_a_mean_that_contains_the_row_halves_the_gradient(pairs):
    """By column it halves where both rows decide and takes all where one does: that also turns the gradient."""
    want = slope(steps=2, start=1)
    for baseline, share in ((no_baseline, 1.0), (leave_one_out_baseline, 1.0), (batch_mean_baseline, 0.5)):
        close(over_pairs(a.reinforce(baseline), pairs), share * want)
    for baseline in (no_baseline, leave_one_out_baseline):
        close(over_pairs(a.reinforce_to_go(baseline), pairs), want)
    np.testing.assert_allclose(
        size_and_cosine(over_pairs(a.reinforce_to_go(batch_mean_baseline), pairs), want), (0.484, 0.9985), rtol=1e-3
    )


def test_in_a_batch_of_two_whitening_turns_the_gradient(pairs):
    """As its mean and its deviation are those of the row's own two or four terms."""
    want = slope(steps=2, start=1)
    for lam, cosine in ((1.0, 0.9955), (0.0, 0.9893)):
        np.testing.assert_allclose(size_and_cosine(over_pairs(a.vpg(1.0, lam), pairs), want)[1], cosine, atol=1e-4)


def size_and_cosine(got, want):
    lengths = np.linalg.norm(got), np.linalg.norm(want)
    return lengths[0] / lengths[1], (got * want).sum() / lengths[0] / lengths[1]
