"""Whole algorithms against the peers: credit from recorded rewards, loss and gradient from recorded log-probs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms import grpo, ppo, reinforce, sft, with_kl
from rljax.algorithms.reinforce import group_mean
from rljax.ops.weights import constant_length, sequence_mean, token_mean
from rljax.train.objective import policy_objective
from rljax.types import Batch, PolicyOutput, Trajectory
from tests.ops.golden import close, golden


def trajectory(mask, **fields):
    nothing = jnp.zeros(mask.shape, jnp.int32)
    fields.setdefault("logp", jnp.zeros(mask.shape))
    return Trajectory(inputs=nothing, actions=nothing, mask=mask > 0, **fields)


@pytest.mark.parametrize(
    ("recorded", "ending", "algorithm"),
    [
        ("verl_grpo_advantage", "std1", grpo()),
        ("verl_grpo_advantage", "std0", grpo(std_epsilon=None)),
        ("verl_grpo_advantage", "std0", reinforce(group_mean)),
        ("verl_rloo_advantage", "", reinforce()),
    ],
)
def test_verl_group_advantages(shared, recorded, ending, algorithm):
    """Left out: groups with a row without tokens (a reward of 0 for verl, no row at all here), and groups of one, which
    keep their reward in verl's GRPO and have advantage 0 here (in RLOO there is nothing to subtract, here as there)."""
    compared = 0
    for case, (_, ins, outs) in golden(shared, recorded).items():
        if not case.endswith(ending):
            continue
        mask, group = ins["response_mask"], ins["index"]
        rewards = ins["token_level_rewards"]
        batch = algorithm.credit(trajectory(mask, rewards=rewards, group=group), {})
        group, has_tokens = np.asarray(group), np.asarray(mask).any(axis=1)
        size = (group[:, None] == group).sum(axis=1)
        same = ~np.isin(group, group[~has_tokens]) & ((size > 1) | (recorded == "verl_rloo_advantage"))
        close(batch.advantages[same], outs["advantages"][same], case=case)
        assert same.sum() > 1
        compared += 1
    assert compared == 4


def test_tunix_group_advantages(shared):
    hyper, ins, outs = golden(shared, "tunix_group_advantages")["a"]
    group = jnp.arange(len(ins["rewards"])) // hyper["num_generations"]
    traj = trajectory(jnp.ones((len(group), 1)), rewards=ins["rewards"][:, None], group=group)
    for name, algorithm in {"grpo": grpo(), "drgrpo": grpo(std_epsilon=None), "rloo": reinforce()}.items():
        close(algorithm.credit(traj, {}).advantages[:, 0], outs[name], case=name)


def test_verl_ppo_credit(shared):
    for case, (hyper, ins, outs) in golden(shared, "verl_gae").items():
        mask, values = ins["response_mask"], jnp.pad(ins["values"], ((0, 0), (0, 1)))
        traj = trajectory(mask, rewards=ins["token_level_rewards"], values=values)
        batch = ppo(gamma=hyper["gamma"], lam=hyper["lam"]).credit(traj, {})
        close(batch.returns, outs["returns"], where=mask, case=case)
        close(batch.advantages, outs["advantages"], where=mask, case=case, atol=1e-5)


def loss_and_gradient(algorithm, batch, logp):
    """Through the objective, as `update` would, of a policy that is its own log-probs."""
    objective = policy_objective(lambda params, frozen, traj: PolicyOutput(logp=params), algorithm)
    batch = objective.prepare(logp, {}, batch, jax.random.key(0))
    (loss, _), gradient = jax.value_and_grad(lambda x: objective.loss(x, {}, batch), has_aux=True)(logp)
    return loss, gradient


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "grpo_k3"])
def test_trl_grpo_family_loss(shared, name):
    for kind in ("right", "left", "holes", "empty"):
        hyper, ins, outs = golden(shared, "trl_grpo_family_loss")[f"{kind}_{name}"]
        reductions = {"dapo": token_mean, "dr_grpo": constant_length(float(hyper["max_completion_length"]))}
        algorithm = grpo(hyper["epsilon_low"], hyper["epsilon_high"], weights=reductions.get(name, sequence_mean))
        if "beta" in hyper:
            algorithm = with_kl(algorithm, hyper["beta"])
        mask = ins["completion_mask"] > 0
        traj = trajectory(mask, logp=ins["old_per_token_logps"], ref_logp=ins.get("ref_per_token_logps"))
        advantages = jnp.broadcast_to(ins["advantages"][:, None], mask.shape)
        batch = Batch(traj=traj, advantages=advantages, mask=mask)
        loss, gradient = loss_and_gradient(algorithm, batch, ins["per_token_logps"])
        # TRL divides by all rows, also those without tokens (not so in dapo).
        scale = 1.0 if name == "dapo" else mask.any(axis=1).mean()
        close(loss * scale, outs["loss"], case=kind)
        close(gradient * scale, outs["grad_per_token_logps"], case=kind)


@pytest.mark.parametrize(("token_level", "weights"), [(1, token_mean), (0, sequence_mean)])
def test_openrlhf_sft_loss(shared, token_level, weights):
    for kind in ("right", "holes"):
        _, ins, outs = golden(shared, "openrlhf_sft_loss")[f"{kind}_token{token_level}"]
        algorithm, mask = sft()._replace(weights=weights), ins["loss_mask"]
        batch = algorithm.credit(trajectory(mask), {})
        loss, gradient = loss_and_gradient(algorithm, batch, ins["per_token_logps"])
        close(loss, outs["loss"], case=kind)
        close(gradient, outs["grad"], case=kind)
