"""The algorithms and the weightings that experiments/tables/estimators.py measures."""

from experiments.tables.exact.gradients import BETA, ENTROPY_COEFFICIENT
from rljax import algorithms as a
from rljax.algorithms.common.wrappers import with_needs
from rljax.algorithms.reinforce import batch_mean_baseline, group_mean_baseline, leave_one_out_baseline, no_baseline
from rljax.ops.kl import k1, k2, k3, k3_with_k2_gradient
from rljax.ops.ratios import sequence_product
from rljax.ops.weights import seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm, token_mean
from rljax.types import Algorithm

MAX_LENGTH = 3  # tokens of a completion
WEIGHTINGS = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm(float(MAX_LENGTH)),
}
RLOO = a.reinforce(leave_one_out_baseline)

# Methods that need `step_ends` get a reward for each token; the others one for the completion.
ALGORITHMS: dict[str, Algorithm] = {
    "REINFORCE, no baseline": a.reinforce(no_baseline),
    "REINFORCE, batch mean": a.reinforce(batch_mean_baseline),
    "REINFORCE, group mean": a.reinforce(group_mean_baseline),
    "REINFORCE, leave one out": RLOO,
    "RLOO": a.rloo(),
    "ReMax": a.remax(),
    "OPO": a.opo(),
    "OTB": a.otb(),
    "REINFORCE++": a.reinforce_pp(),
    "REINFORCE++, baseline": a.reinforce_pp_baseline(),
    "GPG": a.gpg(),
    "MaxRL": a.maxrl(),
    "Pass@k": a.grpo_pass_at_k(),
    "GRPO": a.grpo(),
    "GRPO, process": with_needs(a.grpo_process(), "step_ends"),
    "CAPO": with_needs(a.capo(), "step_ends"),
    "Dr.GRPO": a.dr_grpo(float(MAX_LENGTH)),
    "DAPO": a.dapo(),
    "DAPO, overlong filter": a.filter_overlong(a.dapo()),
    "DAPO, 80/20": a.high_entropy_mask(a.dapo()),
    "Lite PPO": a.lite_ppo(),
    "GDPO": a.gdpo(),
    "GSPO": a.gspo(),
    "GSPO-token": a.gspo_token(),
    "LUSPO": a.luspo(),
    "CISPO": a.cispo(),
    "SAPO": a.sapo(),
    "GMPO": a.gmpo(),
    "VESPO": a.vespo(),
    "DPPO, total variation": a.dppo_tv(),
    "DPPO, KL": a.dppo_kl(),
    "DRO": a.dro(),
    "Clip-Cov": a.clip_cov(bounds=(0.05, 5.0)),
    "KL-Cov": a.kl_cov(),
    "FIPO": a.fipo(),
    "REAL": a.real(),
    "A*-PO": a.a_star_po(BETA),
    "Nash-MD": a.nash_md(BETA),
    "Reinforce-Ada": a.reinforce_ada(),
    "off-policy PG, sequence ratio": a.off_policy_pg(),
    "off-policy PG, sequence ratio, at most 2": a.off_policy_pg(cap=2.0),
    "V-trace, exact critic": a.vtrace(),
    "PPO, exact critic": a.ppo(),
    "PPO, KL penalty, exact critic": a.ppo_penalty(),
    "VAPO, exact critic": a.vapo(),
    "VinePPO, exact values": with_needs(a.vine_ppo(), "values"),
    "SFT on its own completions": a.sft(),
    "leave one out + k1 in the loss": a.with_kl(RLOO, BETA, k1, allow_k1=True),
    "leave one out + k2 in the loss": a.with_kl(RLOO, BETA, k2),
    "leave one out + k3 in the loss": a.with_kl(RLOO, BETA, k3),
    "leave one out + k3 with k2's gradient": a.with_kl(RLOO, BETA, k3_with_k2_gradient),
    "leave one out + importance-weighted k3": a.with_importance_weighted_kl(RLOO, BETA),
    "leave one out + k1 in the reward": a.kl_in_reward(RLOO, BETA),
    "ReMax + k1 in the reward": a.kl_in_reward(a.remax(), BETA),
    "GRPO + k3 in the loss": a.with_kl(a.grpo(), BETA),
    "GRPO + k1 in the reward": a.kl_in_reward(a.grpo(), BETA),
    "leave one out + entropy": a.with_entropy(RLOO, ENTROPY_COEFFICIENT),
    "leave one out + distillation": a.distill(RLOO, BETA),
    "leave one out + NLL of positive completions": a.with_positive_nll(RLOO),
    "DAPO, overlong punishment": a.overlong_penalty(a.dapo(), MAX_LENGTH, 1),
    "GRPO, off-policy sequence mask": a.off_policy_sequence_mask(a.grpo()),
    "GRPO, rejected by sequence": a.reject(a.grpo(), high=0.05),
    "GRPO, truncated sampler ratio": a.truncate_is(a.grpo()),
    "GRPO, masked sampler ratio (IcePop)": a.mask_is(a.grpo()),
    "leave one out, sequence sampler ratio": a.truncate_is(RLOO, 1e6, sequence_product),
    "leave one out, normalized sampler ratio": a.normalized_is(RLOO, seq_mean_token_mean, 1e6, sequence_product),
}
