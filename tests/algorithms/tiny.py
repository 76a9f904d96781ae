"""What tests of algorithms share: every algorithm, a policy that is a table, a rollout with all the rough edges."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rljax.algorithms import grpo, ppo, reinforce, sft, with_entropy, with_importance_weighted_kl, with_kl
from rljax.algorithms.reinforce import batch_mean, group_mean, leave_one_out, no_baseline
from rljax.ops.weights import constant_length, token_mean
from rljax.train.mesh import place_rows
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import PolicyOutput, TrainState, trajectory_of_tokens

B, T, V = 16, 6, 5

ALGORITHMS = {
    "reinforce": reinforce(no_baseline),
    "reinforce, batch mean": reinforce(batch_mean),
    "reinforce, group mean": reinforce(group_mean),
    "reinforce, leave one out": reinforce(leave_one_out),
    "grpo": grpo(),
    "grpo without std": grpo(std_epsilon=None, weights=constant_length(float(T))),
    "grpo, clip higher": grpo(high=0.28, weights=token_mean),
    "ppo": ppo(),
    "sft": sft(),
    "grpo + kl": with_kl(grpo(), 0.3),
    "grpo + importance-weighted kl": with_importance_weighted_kl(grpo(), 0.3),
    "grpo + entropy": with_entropy(grpo(), 0.2),
    "ppo + kl + entropy": with_entropy(with_kl(ppo(), 0.3), 0.2),
}


def table_policy(params, frozen, traj):
    """A softmax of one row of a table per state; the state is the token seen."""
    log_p = jax.nn.log_softmax(params["table"][traj.inputs] / traj.temperature[..., None])
    return PolicyOutput(
        logp=jnp.take_along_axis(log_p, traj.actions[..., None], axis=-1)[..., 0],
        entropy=-(jnp.exp(log_p) * log_p).sum(-1),
        values=params["values"][traj.inputs],
    )


@lru_cache
def table_params():
    draw = np.random.default_rng(0)
    return {"table": jnp.float32(draw.normal(size=(V, V))), "values": jnp.float32(draw.normal(size=V))}


@lru_cache
def rollout(seed=0, vocabulary=V):
    """16 rows of 6 decisions: padding on both sides, tool output inside, ids in any order, a group of one.

    Row 3 has no decision; row 7 could not be judged. The behaviour policy, the reference and the critic are arbitrary.
    """
    draw = np.random.default_rng(seed)
    cells = (B, T + 1)
    tokens = draw.integers(vocabulary, size=cells)
    start, stop = draw.integers(0, 3, size=(B, 1)), draw.integers(4, T + 2, size=(B, 1))
    column = np.arange(T + 1)
    inside = (column >= start) & (column < stop)
    chosen = inside & (column > start) & (draw.random(cells) < 0.8)
    chosen[np.arange(B), stop[:, 0] - 1] = True
    chosen[3] = False
    last = chosen & (np.cumsum(chosen[:, ::-1], axis=1)[:, ::-1] == 1)
    ended = draw.random((B, 1)) < 0.5
    rewards = np.where(last, draw.normal(size=(B, 1)), 0.0)
    rewards[7] = np.where(last[7], np.nan, 0.0)
    values = np.pad(draw.normal(size=(B, T)), ((0, 0), (0, 1)))
    logp, ref_logp, final_values = np.log(draw.uniform(0.05, 0.9, size=(3, *cells)))
    floats = {"rewards": rewards, "ref_logp": ref_logp, "final_values": final_values}
    floats["temperature"] = draw.uniform(0.5, 2.0, size=cells)
    traj = trajectory_of_tokens(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(inside, jnp.int32),
        jnp.asarray(chosen),
        jnp.float32(logp),
        terminated=jnp.asarray(last & ended),
        truncated=jnp.asarray(last & ~ended),
        group=jnp.asarray(np.array([9, 4, 4, 9, 9, 4, 2, 9, 4, 4, 9, 4, 7, 9, 9, 7])),
        **{name: jnp.float32(x) for name, x in floats.items()},
    )
    return traj.replace(values=jnp.float32(values))


def credited(algorithm, traj, shardings=None):
    traj = traj if shardings is None else place_rows(shardings, traj)
    return jax.jit(algorithm.credit)(traj, {})


GRADIENT = optax.sgd(1.0, momentum=0.0)  # its state after one step is the gradient, to the last bit


def state_of(params, optimizer=GRADIENT):
    params = jax.tree.map(jnp.copy, params)
    return TrainState(step=0, params=params, opt_state=optimizer.init(params), key=jax.random.key(0))


@lru_cache
def updater(algorithm, policy=table_policy, micro_batches=1):
    return make_update(policy_objective(policy, algorithm), GRADIENT, micro_batches)


def learn(algorithm, batch, params, policy=table_policy, micro_batches=1, shardings=None):
    """The gradient and the metrics (with the loss) of one update."""
    state = state_of(params)
    if shardings is None:
        state, metrics = updater(algorithm, policy, micro_batches)(state, batch)
    else:
        update = make_update(policy_objective(policy, algorithm), GRADIENT, micro_batches, shardings)
        state, metrics = update(jax.device_put(state, shardings.state), batch)
    return jax.device_get((state.opt_state[0].trace, metrics))


def agree(got, want, rtol=1e-5, rounding=1e-7):
    """Every leaf equal to rtol of the largest number in it, or to the rounding of numbers of size 1."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(want)]
    for name, x, y in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max() + rounding, err_msg=name)
