"""Advantages against the peers: `algorithm.credit` of trajectories that hold the recorded rewards."""

import jax.numpy as jnp

from rljax.algorithms import (
    gdpo,
    gpg,
    grpo,
    grpo_pass_at_k,
    kl_in_reward,
    lite_ppo,
    opo,
    otb,
    ppo,
    reinforce,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
)
from rljax.algorithms.reinforce import group_mean_baseline
from rljax.ops import groups, sequences, shaping, statistics
from rljax.types import Algorithm, Batch, Trajectory
from tests import dialects
from tests.golden.entry import Case, Entry, trajectory


def mask_of(case: Case, name: str = "response_mask"):
    return case.ins[name] > 0


def of_rows(batch):
    """[B] the advantage that all decisions of a row share."""
    return sequences.sequence_mean(batch.advantages, batch.mask)[:, 0]


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_rows(case: Case) -> tuple[Trajectory, jnp.ndarray]:
    """The trajectory in which verl's every row counts, and its rewards [B]."""
    counted, rewards = dialects.verl_counted(mask_of(case), case.ins["token_level_rewards"], case.width)
    traj = trajectory(counted, rewards=rewards, group=case.ins["index"])
    return traj, jnp.where(counted, rewards, 0.0).sum(axis=1)


def verl_outcome(case: Case, algorithm: Algorithm, lone_epsilon: float | None = None) -> dict:
    """`lone_epsilon`: a row alone in its group keeps its reward, divided by 1 + this."""
    traj, rewards = verl_rows(case)
    advantages = algorithm.credit(traj, {}).advantages
    if lone_epsilon is not None:
        advantages = dialects.verl_lone_rows(advantages, rewards, traj.group, lone_epsilon)
    return {"advantages": jnp.where(mask_of(case), advantages, 0.0)}


def verl_epsilon(case: Case) -> float | None:
    return case.hyper["epsilon"] if case.hyper["norm_adv_by_std_in_grpo"] else None


def verl_grpo(case: Case) -> dict:
    epsilon = verl_epsilon(case)
    return verl_outcome(case, grpo(std_epsilon=epsilon), epsilon or 0.0)


def verl_grpo_vectorized(case: Case) -> dict:
    traj, rewards = verl_rows(case)
    epsilon = verl_epsilon(case)
    advantages = grpo(std_epsilon=epsilon).credit(traj, {}).advantages
    if epsilon is not None:
        std = groups.group_std(rewards, traj.group, jnp.ones(rewards.shape, bool))
        advantages = dialects.verl_floored(advantages, std, rewards, traj.group, epsilon)
    advantages = dialects.verl_lone_rows(advantages, rewards, traj.group, epsilon or 0.0)
    return {"advantages": jnp.where(mask_of(case), advantages, 0.0)}


def verl_passk(case: Case) -> dict:
    epsilon = case.hyper["epsilon"]
    out = verl_outcome(case, grpo_pass_at_k(std_epsilon=epsilon))
    if case.hyper["norm_adv_by_std_in_grpo"]:
        return out
    traj, rewards = verl_rows(case)
    std = groups.group_std(rewards, traj.group, jnp.ones(rewards.shape, bool))
    return {"advantages": out["advantages"] * (std + epsilon)[:, None]}


def verl_rloo(case: Case) -> dict:
    return verl_outcome(case, rloo())


def verl_rloo_vectorized(case: Case) -> dict:
    """A row alone gets 0 here, its reward in verl's other RLOO and in ours."""
    advantages = verl_outcome(case, rloo())["advantages"]
    return {"advantages": jnp.where(dialects.lone(case.ins["index"])[:, None], 0.0, advantages)}


def verl_gpg(case: Case) -> dict:
    traj, rewards = verl_rows(case)
    scale = dialects.verl_gpg_scale(rewards, traj.group)
    alpha = len(rewards) / jnp.maximum((rewards != 0).sum(), 1)
    advantages = scale * gpg().credit(traj, {}).advantages
    advantages = dialects.verl_lone_rows(advantages, alpha * rewards, traj.group)
    return {"advantages": jnp.where(mask_of(case), advantages, 0.0)}


def verl_opo(case: Case) -> dict:
    """Rows without tokens weigh nothing in verl's baseline either."""
    mask, rewards, group = mask_of(case), case.ins["token_level_rewards"], case.ins["index"]
    advantages = opo().credit(trajectory(mask, rewards=rewards, group=group), {}).advantages
    total = jnp.where(mask, rewards, 0.0).sum(axis=1)
    return {"advantages": jnp.where(mask, dialects.verl_lone_rows(advantages, total, group), 0.0)}


def verl_otb(case: Case) -> dict:
    x, mask = case.ins, mask_of(case)
    facts = {"rewards": x["token_level_rewards"], "group": x["index"], "sum_pi_squared": x["sum_pi_squared"]}
    batch = otb().credit(trajectory(mask, old_logp=x["old_log_probs"], **facts), {})
    norms = jnp.where(mask, 1.0 - 2.0 * jnp.exp(x["old_log_probs"]) + x["sum_pi_squared"], 0.0)
    weight = jnp.where(mask, jnp.cumsum(norms, axis=1), 0.0)
    ours = batch.returns - batch.advantages
    baseline = dialects.verl_token_baseline(ours, batch.returns, weight, x["index"], mask, case.hyper["epsilon"])
    return {"advantages": batch.returns - baseline, "returns": batch.returns}


def verl_remax(case: Case) -> dict:
    x, mask = case.ins, mask_of(case)
    traj = trajectory(mask, rewards=x["token_level_rewards"], baseline=x["reward_baselines"])
    advantages = remax().credit(traj, {}).advantages
    return {"advantages": advantages, "returns": advantages + x["reward_baselines"][:, None]}


def verl_new_reinforce_pp(case: Case) -> dict:
    traj = trajectory(mask_of(case), rewards=case.ins["token_level_rewards"])
    return verl_whitened_returns(reinforce_pp(gamma=case.hyper["gamma"]).credit(traj, {}))


def verl_whitened_returns(batch: Batch) -> dict:
    advantages = dialects.verl_whitened(batch.advantages, batch.returns, batch.mask)
    return {"advantages": jnp.where(batch.mask, advantages, 0.0), "returns": batch.returns}


def verl_reinforce_pp(case: Case) -> dict:
    mask = mask_of(case)
    rewards, runs = dialects.runs_as_rows(case.ins["token_level_rewards"], mask)
    out = verl_whitened_returns(reinforce_pp(gamma=case.hyper["gamma"]).credit(trajectory(runs, rewards=rewards), {}))
    return {name: x.reshape(len(mask), -1, mask.shape[1]).sum(axis=1) for name, x in out.items()}


def verl_reinforce_pp_baseline(case: Case) -> dict:
    """Where a row has no tokens or is alone in its group, the baseline is taken first, as verl takes it; then the rows
    are one group, whose mean the whitening takes out again."""
    mask, group = mask_of(case), case.ins["index"]
    centered = verl_outcome(case, reinforce(group_mean_baseline), 0.0)["advantages"]
    if mask.any(axis=1).all() and not dialects.lone(group).any():
        traj = trajectory(mask, rewards=case.ins["token_level_rewards"], group=group)
    else:
        rewards = jnp.where(shaping.last_decision(mask), centered, 0.0)
        traj = trajectory(mask, rewards=rewards, group=jnp.zeros_like(group))
    advantages = dialects.verl_whitened(reinforce_pp_baseline().credit(traj, {}).advantages, centered, mask)
    return {"advantages": jnp.where(mask, advantages, 0.0)}


def verl_gdpo(case: Case) -> dict:
    """verl whitens over tokens in the end, we over rows: whitening again, over tokens, takes ours out. Where a row is
    alone in its group, whose rewards verl keeps, they have to be put in before: each reward is GRPO's then."""
    x, mask, epsilon = case.ins, mask_of(case), case.hyper["epsilon"]
    counted, nothing = dialects.verl_counted(mask, jnp.zeros(mask.shape), case.width)
    if not dialects.lone(x["index"]).any():
        traj = trajectory(counted, rewards=nothing, group=x["index"], scores=x["rewards_per_func"])
        batch = gdpo(tuple(map(float, x["reward_weights"])), epsilon=epsilon).credit(traj, {})
        return {"advantages": statistics.whiten(batch.advantages, mask)}
    total = nothing
    for weight, scores in zip(x["reward_weights"], x["rewards_per_func"].T, strict=True):
        rewards = shaping.at_last_decision(scores, counted)
        one = case._replace(ins={**x, "token_level_rewards": rewards})
        total = total + weight * verl_outcome(one, grpo(std_epsilon=epsilon), epsilon)["advantages"]
    return {"advantages": statistics.whiten(total, mask)}


# ------------------------------------------------------------------------------------------------------ TRL, ms-swift


def weighted_sum(x: dict):
    """[B] Σ w_k r_k over the rewards that were given; NaN where none was."""
    given = jnp.isfinite(x["rewards_per_func"])
    total = jnp.where(given, x["rewards_per_func"] * x["reward_weights"][None], 0.0).sum(axis=1)
    return jnp.where(given.any(axis=1), total, jnp.nan)


def one_decision(rewards, **fields) -> Trajectory:
    return trajectory(jnp.ones((len(rewards), 1), bool), rewards=rewards[:, None], **fields)


def trl_grpo_gdpo(case: Case) -> dict:
    x, epsilon = case.ins, case.hyper["eps"]
    by_scale = {
        "group": grpo(std_epsilon=epsilon),
        "batch": lite_ppo(std_epsilon=epsilon),
        "none": grpo(std_epsilon=None),
    }
    algorithm = by_scale[case.hyper["scale_rewards"]]
    if case.hyper["multi_objective_aggregation"] == "normalize_then_sum":
        algorithm = gdpo(tuple(map(float, x["reward_weights"])), epsilon=epsilon)
    traj = one_decision(weighted_sum(x), scores=x["rewards_per_func"], group=x["index"])
    return {"advantages": algorithm.credit(traj, {}).advantages[:, 0]}


def trl_rloo(case: Case) -> dict:
    x, hyper = case.ins, case.hyper
    rewards = weighted_sum(x)
    if hyper["reward_clip_range"] is not None:
        rewards = shaping.clip_rewards(rewards, *map(float, hyper["reward_clip_range"]))
    mask = mask_of(case, "completion_mask")
    counted = dialects.verl_counted(mask, jnp.zeros(mask.shape), case.width)[0]
    old, ref = (jnp.where(mask, x[name], 0.0) for name in ("old_per_token_logps", "ref_per_token_logps"))
    facts = {"rewards": shaping.at_last_decision(rewards, counted), "group": x["index"]}
    traj = trajectory(counted, logp=old, ref_logp=ref, **facts)
    batch = kl_in_reward(rloo(), hyper["beta"]).credit(traj, {})
    advantages, judged = dialects.trl_alone(of_rows(batch), jnp.isfinite(rewards), x["index"])
    if hyper["normalize_advantages"]:  # TRL's name for it is REINFORCE++
        centered = advantages - statistics.masked_mean(advantages, judged)
        advantages = jnp.where(judged, centered / (statistics.masked_std(advantages, judged) + 1e-4), 0.0)
    return {"advantages": advantages}


def swift_advantages(case: Case) -> dict:
    """Its RLOO is divided by the deviation of the rewards; its REINFORCE++ by that of the centred rewards."""
    x, hyper = case.ins, case.hyper
    estimator, scale, group = hyper["advantage_estimator"], hyper["scale_rewards"], x["index"]
    beta = hyper["beta"] if hyper["kl_in_reward"] else 0.0
    rewards = jnp.nan_to_num(weighted_sum(x))  # what nobody judged has reward 0
    kl = x["kl_values"][:, None]
    traj = one_decision(rewards, scores=x["rewards_per_func"], group=group, logp=kl, ref_logp=jnp.zeros_like(kl))

    algorithm = {
        ("grpo", "group"): grpo(std_epsilon=1e-4),
        ("grpo", "batch"): lite_ppo(std_epsilon=1e-4),
        ("grpo", "none"): grpo(std_epsilon=None),
        ("grpo", "gdpo"): gdpo(tuple(map(float, x["reward_weights"])), epsilon=1e-8),
        ("rloo", scale): rloo(),
        ("reinforce_plus_plus", scale): reinforce(group_mean_baseline),
    }[estimator, scale]
    algorithm = kl_in_reward(algorithm, beta) if beta else algorithm
    batch = algorithm.credit(traj, {})
    advantages, rewards = batch.advantages[:, 0], batch.traj.rewards[:, 0]
    if estimator != "grpo":
        of = {"rloo": rewards, "reinforce_plus_plus": advantages}[estimator]
        advantages = dialects.swift_scaled(advantages, of, group, scale)
    return {"advantages": advantages, "rewards": rewards}


# ---------------------------------------------------------------------------------------------------- OpenRLHF, tunix


def openrlhf_advantages(case: Case) -> dict:
    """Group estimators make a reward of each row, which stands on its last token; -β kl is added to every token; the
    advantages are rewards-to-go of these, whitened for some."""
    x, hyper, mask = case.ins, case.hyper, mask_of(case, "action_mask")
    columns = dialects.openrlhf_columns(mask)
    facts = {"logp": jnp.where(mask, x["kl"], 0.0), "ref_logp": jnp.zeros(mask.shape), "group": x["index"]}
    values = jnp.pad(jnp.where(mask, x["values"], 0.0), ((0, 0), (0, 1)))
    beta = max(hyper["kl_coef"], 0.0)

    def credited(algorithm, rewards):
        rewards = shaping.at_last_decision(rewards, mask)
        traj = trajectory(columns, rewards=rewards, values=values, baseline=jnp.zeros(len(mask)), **facts)
        return kl_in_reward(algorithm, beta).credit(traj, {})

    estimator, gamma = hyper["estimator"], hyper["gamma"]
    if estimator == "gae":
        batch = credited(ppo(gamma=gamma, lam=hyper["lambd"]), x["rewards"])
        advantages, returns, raw = batch.advantages, batch.returns, batch.returns - values[:, :-1]
    elif estimator == "reinforce":
        batch = credited(reinforce_pp(gamma=gamma), x["rewards"])
        advantages, returns, raw = batch.advantages, batch.returns, batch.returns
    else:
        algorithm = {
            "rloo": rloo(),
            "reinforce_baseline": reinforce(group_mean_baseline),
            "dr_grpo": grpo(std_epsilon=None),
            "group_norm": grpo(std_epsilon=1e-9),
        }[estimator]
        shaped = of_rows(algorithm.credit(one_decision(x["rewards"], group=x["index"]), {}))
        advantages = returns = raw = credited(remax(), shaped).advantages
    if estimator in ("gae", "reinforce", "reinforce_baseline"):
        if hyper["no_std_norm"]:
            advantages = raw - statistics.masked_mean(raw, mask)
        else:
            advantages = dialects.openrlhf_whitened(advantages, mask)
    return {"advantages": advantages, "returns": returns}


def tunix_group_advantages(case: Case) -> dict:
    traj = one_decision(case.ins["rewards"], group=case.ins["index"])
    algorithms = {"grpo": grpo(), "drgrpo": grpo(std_epsilon=None), "rloo": rloo()}
    return {name: algorithm.credit(traj, {}).advantages[:, 0] for name, algorithm in algorithms.items()}


def verl(pins: str, run, **changes) -> Entry:
    return Entry(pins, run, mask="response_mask", **changes)


TABLE: dict[str, Entry] = {
    "verl_grpo_advantage": verl("grpo", verl_grpo),
    "verl_grpo_vectorized_advantage": verl("grpo", verl_grpo_vectorized, rtol=1e-4),  # by the order of its float32 sums
    "verl_grpo_passk_advantage": verl("grpo_pass_at_k", verl_passk),
    "verl_rloo_advantage": verl("rloo", verl_rloo),
    "verl_rloo_vectorized_advantage": verl("rloo", verl_rloo_vectorized),
    "verl_gpg_advantage": verl("gpg", verl_gpg),
    "verl_opo_advantage": verl("opo", verl_opo),
    "verl_optimal_token_baseline_advantage": verl("otb", verl_otb, at_mask=True),
    "verl_remax_advantage": verl("remax", verl_remax, at_mask=True),
    "verl_reinforce_plus_plus_advantage": verl("reinforce_pp", verl_reinforce_pp, at_mask=True),
    "verl_new_reinforce_plus_plus_advantage": verl("reinforce_pp", verl_new_reinforce_pp),
    "verl_reinforce_plus_plus_baseline_advantage": verl("reinforce_pp_baseline", verl_reinforce_pp_baseline),
    "verl_new_gdpo_advantage": verl("gdpo", verl_gdpo, rtol=1e-5),
    "trl_grpo_gdpo_advantage": Entry("grpo, lite_ppo, gdpo", trl_grpo_gdpo),
    "trl_rloo_advantage": Entry("rloo, kl_in_reward", trl_rloo, mask="completion_mask"),
    "swift_advantages": Entry("grpo, lite_ppo, gdpo, rloo, kl_in_reward", swift_advantages),
    "openrlhf_advantages": Entry(
        "ppo, reinforce_pp, rloo, grpo, kl_in_reward",
        openrlhf_advantages,
        rtol=1e-5,  # it whitens in float32
        mask="action_mask",
        at_mask=True,
    ),
    "tunix_group_advantages": Entry("grpo, rloo", tunix_group_advantages, rtol=1e-5),
}
