"""What tests of algorithms share: every algorithm, a policy that is a table, a rollout with all the rough edges."""

import inspect
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import algorithms as a
from rljax.algorithms.common.wrappers import with_needs
from rljax.algorithms.reinforce import batch_mean_baseline, group_mean_baseline, leave_one_out_baseline, no_baseline
from rljax.ops import sequences
from rljax.ops.kl import k2, k3_with_k2_gradient
from rljax.ops.ratios import sequence_geometric_mean, sequence_product
from rljax.ops.weights import prompt_mean, seq_mean_token_mean, token_mean
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import Algorithm, PolicyOutput, TrainState, trajectory_of_tokens
from tests import bounds

B, T, V = 16, 6, 5


# Every algorithm and wrapper, with settings under which the tiny rollout meets both sides of each threshold.
def of_version(algorithm: Algorithm, version: int) -> Algorithm:
    """The algorithm at a step whose policy has this version."""

    def credit(traj, coefficients):
        batch = algorithm.credit(traj, {"version": version, **coefficients})
        return batch.replace(coefficients=coefficients)

    return algorithm._replace(credit=credit)


LISTED = {
    "reinforce": a.reinforce(no_baseline),
    "reinforce, batch mean": a.reinforce(batch_mean_baseline),
    "reinforce, group mean": a.reinforce(group_mean_baseline),
    "reinforce, leave one out": a.reinforce(leave_one_out_baseline),
    "reinforce_to_go": a.reinforce_to_go(gamma=0.9),
    "reinforce_to_go, batch mean": a.reinforce_to_go(batch_mean_baseline),
    "rloo": a.rloo(),
    "remax": a.remax(),
    "reinforce_pp": a.reinforce_pp(gamma=0.9),
    "reinforce_pp_baseline": a.reinforce_pp_baseline(),
    "opo": a.opo(),
    "otb": a.otb(),
    "gpg": a.gpg(),
    "maxrl": a.maxrl(),
    "grpo_pass_at_k": a.grpo_pass_at_k(),
    "pass_at_k_training": a.pass_at_k_training(3),
    "opmd": a.opmd(0.3),
    "raft": a.raft(seq_mean_token_mean),
    "prime": a.prime(0.5, 0.9),
    "grpo": a.grpo(),
    "grpo_process": a.grpo_process(),
    "grpo, prompt mean": a.grpo(weights=prompt_mean),
    "dr_grpo": a.dr_grpo(float(T)),
    "dapo": a.dapo(),
    "lite_ppo": a.lite_ppo(),
    "gdpo": a.gdpo((1.0, 0.3)),
    "gspo": a.gspo(0.2, 0.3),
    "gspo_token": a.gspo_token(0.2, 0.3),
    "luspo": a.luspo(0.2, 0.3),
    "cispo": a.cispo(0.3, 1.5),
    "sapo": a.sapo(),
    "gmpo": a.gmpo(),
    "vespo": a.vespo(),
    "dppo_tv": a.dppo_tv(cap=2.0),
    "dppo_kl": a.dppo_kl(cap=2.0),
    "dro": a.dro(),
    "clip_cov": a.clip_cov(share=0.1, bounds=(0.05, 5.0)),
    "kl_cov": a.kl_cov(share=0.1),
    "fipo": a.fipo(safe_ratio=1.5),
    "real": a.real(),
    "a_star_po": a.a_star_po(0.1),
    "capo": a.capo(),
    "reinforce_ada": a.reinforce_ada(),
    "off_policy_pg": a.off_policy_pg(),
    "off_policy_pg, by token": a.off_policy_pg(sequence_geometric_mean, cap=1.5),
    "vtrace": a.vtrace(0.95, 0.9, 1.3, 1.1, 1.2),
    "vpg": a.vpg(),
    "trpo": a.trpo(),
    "trpo_gae": a.trpo_gae(),
    "ppo": a.ppo(),
    "ppo, dual clip": a.ppo(dual=1.5, value_clip=None),
    "ppo_penalty": a.ppo_penalty(),
    "vapo": a.vapo(alpha=0.4),
    "vine_ppo": with_needs(a.vine_ppo(), "values"),
    "sft": a.sft(),
    "dft": a.dft(),
    "grpo + kl": a.with_kl(a.grpo(), 0.3),
    "grpo + kl of k2": a.with_kl(a.grpo(), 0.3, k2),
    "grpo + kl of k3 and k2": a.with_kl(a.grpo(), 0.3, k3_with_k2_gradient),
    "grpo + importance-weighted kl": a.with_importance_weighted_kl(a.grpo(), 0.3),
    "grpo + entropy": a.with_entropy(a.grpo(), 0.2),
    "ppo + kl + entropy": a.with_entropy(a.with_kl(a.ppo(), 0.3), 0.2),
    "vapo + positive nll": a.with_positive_nll(a.vapo(), 0.3),
    "rloo + kl in reward": a.kl_in_reward(a.rloo(), 0.1),
    "ppo of RLHF": a.missing_eos_penalty(a.clip_reward(a.kl_in_reward(a.whiten_rewards(a.ppo()), 0.1), 0.9), 0.5),
    "dapo + overlong": a.overlong_penalty(a.filter_overlong(a.dapo()), 4, 2),
    "grpo + exact length": a.lcpo_exact(a.grpo(), 3, 0.2),
    "dr_grpo + length limit": a.lcpo_max(a.dr_grpo(float(T)), 3, 0.3),
    "opmd + group length": a.group_length_reward(a.opmd(0.3), 0.5),
    "rloo + cosine length": a.cosine_length_reward(a.rloo(), 5),
    "grpo + teacher": a.distill(a.grpo(), 0.3),
    "ppo + turn level": a.turn_level(a.ppo(gamma=0.9)),
    "grpo + turn groups": a.turn_groups(a.grpo(), 0.9, 0.5),
    "grpo + tis": a.truncate_is(a.grpo(), 1.2),
    "grpo + tis by sequence": a.truncate_is(a.grpo(), 1.2, sequence_product),
    "ppo + tis": a.truncate_is(a.ppo(), 1.2),
    "grpo + icepop": a.mask_is(a.grpo(), 0.5, 2.0),
    "grpo + mis by sequence": a.mask_is(a.grpo(), 0.7, 1.5, sequence_geometric_mean),
    "grpo + normalized is": a.normalized_is(a.grpo(), token_mean),
    "grpo + normalized is by sequence": a.normalized_is(a.grpo(), seq_mean_token_mean, level=sequence_product),
    "grpo + reject": a.reject(a.grpo(), high=0.6, level=sequences.sequence_max),
    "grpo + filter groups": a.filter_groups(a.grpo()),
    "grpo + staleness filter": of_version(a.staleness_filter(a.grpo(), 1), 3),
    "grpo + off-policy sequence mask": a.off_policy_sequence_mask(a.grpo(), 0.0),
    "dapo + high entropy mask": a.high_entropy_mask(a.dapo(), 0.5),
    "all at once": a.with_kl(a.truncate_is(a.high_entropy_mask(a.clip_cov(share=0.1, bounds=(0.05, 5.0)))), 0.1),
}


def with_defaults(offered: dict, listed: dict) -> dict[str, Algorithm]:
    """Of the functions offered those that give an Algorithm without being given anything, where they are not listed."""
    found = {}
    for name, make in offered.items():
        if name in listed or not inspect.isfunction(make):
            continue
        signature = inspect.signature(make)
        required = [x for x in signature.parameters.values() if x.default is inspect.Parameter.empty]
        if signature.return_annotation is Algorithm and not required:
            found[name] = make()
    return found


# A new algorithm is tested as soon as rljax.algorithms offers it; it is listed above where its defaults do not suit.
ALGORITHMS = {**LISTED, **with_defaults(vars(a), LISTED)}

# One of each kind: how tokens are weighed, a ratio of tokens or of texts, a critic, each annotation, extra facts. The
# others are for the night where each costs a program or two.
KINDS = {
    *("grpo", "remax", "reinforce_pp", "otb", "grpo_process", "dr_grpo", "gspo_token", "gmpo", "kl_cov", "fipo"),
    *("capo", "off_policy_pg", "vtrace", "trpo_gae", "ppo, dual clip", "vapo + positive nll", "dft", "grpo + teacher"),
    *("ppo + kl + entropy", "grpo, prompt mean", "grpo + normalized is by sequence", "dapo + high entropy mask"),
    *("dapo + overlong", "grpo + reject"),
}
assert set(ALGORITHMS) >= KINDS


def kinds_by_day(names):
    """The names as parameters of a test, of which only KINDS are not for the night."""
    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.nightly) for name in names]


def table_policy(params, frozen, traj):
    """A softmax of one row of a table per state; the state is the token seen."""
    log_p = jax.nn.log_softmax(params["table"][traj.inputs] / traj.temperature[..., None])
    return PolicyOutput(
        logp=jnp.take_along_axis(log_p, traj.actions[..., None], axis=-1)[..., 0],
        entropy=-(jnp.exp(log_p) * log_p).sum(-1),
        sum_pi_squared=jnp.exp(2 * log_p).sum(-1),
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
    floats["old_logp"], floats["teacher_logp"] = np.log(draw.uniform(0.05, 0.9, size=(2, *cells)))
    floats["sum_pi_squared"] = draw.uniform(1 / vocabulary, 1.0, size=cells)
    step_ends = last | (chosen & (draw.random(cells) < 0.4))
    floats["rewards"] = np.where(step_ends & ~last, 0.1 * draw.normal(size=cells), rewards)
    scores = draw.normal(size=(B, 2))
    scores[[2, 5], [0, 1]] = np.nan  # one verifier could not judge
    of_rows = {"scores": jnp.float32(scores), "baseline": jnp.float32(draw.normal(size=B))}
    traj = trajectory_of_tokens(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(inside, jnp.int32),
        jnp.asarray(chosen),
        jnp.float32(logp),
        terminated=jnp.asarray(last & ended),
        truncated=jnp.asarray(last & ~ended),
        step_ends=jnp.asarray(step_ends),
        group=jnp.asarray(np.array([9, 4, 4, 9, 9, 4, 2, 9, 4, 4, 9, 4, 7, 9, 9, 7])),
        **{name: jnp.float32(x) for name, x in floats.items()},
        **of_rows,
    )
    version = draw.integers(4, size=(B, T))
    return traj.replace(values=jnp.float32(values), version=jnp.asarray(version, jnp.int32))


ANNOTATIONS = {"values", "ref_logp", "old_logp", "teacher_logp", "baseline", "sum_pi_squared"}


def credited(algorithm, traj):
    """The batch, of a trajectory that has only those annotations which the algorithm says it needs."""
    return algorithm.credit(asked_for(algorithm, traj), {})


def take_rows(tree, rows):
    """These rows of every array. By numpy: one call of JAX's indexing is ten operations."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[rows]) if jnp.ndim(x) else x, tree)


def asked_for(algorithm, traj):
    return traj.replace(**{name: None for name in ANNOTATIONS - set(algorithm.needs)})


GRADIENT = optax.sgd(1.0, momentum=0.0)  # its state after one step is the gradient, to the last bit


def state_of(params, optimizer=GRADIENT):
    params = jax.tree.map(jnp.copy, params)
    return TrainState(step=0, params=params, opt_state=optimizer.init(params), key=jax.random.key(0))


def learn(algorithm, batch, params, policy=table_policy, micro_batches=1):
    """The gradient of one update and its metrics, with the loss, computed operation by operation: nothing compiles."""
    objective, rows = policy_objective(policy, algorithm), batch.mask.shape[0]
    batch = objective.prepare(params, {}, batch, jax.random.split(jax.random.key(0))[1])
    parts = []
    for first in range(micro_batches):
        micro = batch if micro_batches == 1 else take_rows(batch, np.arange(first, rows, micro_batches))
        (loss, metrics), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, {}, micro)
        parts.append((gradient, metrics | {"loss": (loss, 1.0 / micro_batches)}))
    gradient = jax.tree.map(lambda *x: sum(x), *(part[0] for part in parts))
    metrics = {name: _merge(name, [part[1][name] for part in parts]) for name in parts[0][1]}
    return jax.device_get((gradient, metrics))


def _merge(name, pairs):
    values = jnp.stack([jnp.asarray(value) for value, _ in pairs])
    if name.endswith(("_max", "_min")):
        return values.max() if name.endswith("_max") else values.min()
    return values.sum() / jnp.maximum(sum(count for _, count in pairs), 1)


def compiled(algorithm, params, shardings=None, policy=table_policy, micro_batches=1):
    """The real thing: (credit, update), jitted, on a mesh where there are shardings."""
    return jax.jit(algorithm.credit), make_update(
        policy_objective(policy, algorithm), GRADIENT, micro_batches, shardings
    )


# Of a sum over the decisions whose absolute values add up to at most four times its largest number; of a few numbers.
SUMS, NUMBERS = bounds.of_sum(4 * B * T), bounds.of_sum(4)
LOGP = bounds.of_sum(V, 4.0)  # of a log-prob of the table: a softmax over V logits, as large as 4


def agree(got, want, rtol=SUMS, rounding=NUMBERS):
    """Every leaf equal to rtol of the largest number in it, or to the rounding of numbers of size 1."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(want)]
    for name, x, y in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max() + rounding, err_msg=name)
