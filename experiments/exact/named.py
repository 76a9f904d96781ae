"""The algorithms that estimators.py measures, and the weightings it measures them under."""

from exact.gradients import BETA, ENTROPY
from rljax import algorithms as a
from rljax.algorithms.common.wrappers import with_needs
from rljax.algorithms.reinforce import batch_mean_baseline, group_mean_baseline, leave_one_out_baseline, no_baseline
from rljax.ops.kl import k1, k2, k3, k3_with_k2_gradient
from rljax.ops.ratios import sequence_product
from rljax.ops.weights import seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm, token_mean
from rljax.types import Algorithm

LENGTH = 3  # most tokens of an answer
WEIGHTINGS = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm(float(LENGTH)),
}
RLOO = a.reinforce(leave_one_out_baseline)

# A method that reads `step_ends` is paid decision by decision; the others at the end.
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
    "Dr.GRPO": a.dr_grpo(float(LENGTH)),
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
    "Reinforce-Ada": a.reinforce_ada(),
    "off-policy PG, ratio of answers": a.off_policy_pg(),
    "off-policy PG, ratio of answers, at most 2": a.off_policy_pg(cap=2.0),
    "V-trace, exact critic": a.vtrace(),
    "PPO, exact critic": a.ppo(),
    "PPO, KL penalty, exact critic": a.ppo_penalty(),
    "VAPO, exact critic": a.vapo(),
    "VinePPO, exact values": with_needs(a.vine_ppo(), "values"),
    "SFT on its own answers": a.sft(),
    "leave one out + k1 in the loss": a.with_kl(RLOO, BETA, k1, allow_k1=True),
    "leave one out + k2 in the loss": a.with_kl(RLOO, BETA, k2),
    "leave one out + k3 in the loss": a.with_kl(RLOO, BETA, k3),
    "leave one out + k3 with k2's gradient": a.with_kl(RLOO, BETA, k3_with_k2_gradient),
    "leave one out + importance-weighted k3": a.with_importance_weighted_kl(RLOO, BETA),
    "leave one out + k1 in the reward": a.kl_in_reward(RLOO, BETA),
    "ReMax + k1 in the reward": a.kl_in_reward(a.remax(), BETA),
    "GRPO + k3 in the loss": a.with_kl(a.grpo(), BETA),
    "GRPO + k1 in the reward": a.kl_in_reward(a.grpo(), BETA),
    "leave one out + entropy": a.with_entropy(RLOO, ENTROPY),
    "leave one out + distillation": a.distill(RLOO, BETA),
    "leave one out + likelihood of the good": a.with_positive_nll(RLOO),
    "DAPO, overlong punishment": a.overlong_penalty(a.dapo(), LENGTH, 1),
    "GRPO, stale failures dropped": a.off_policy_sequence_mask(a.grpo()),
    "GRPO, rejected by answer": a.reject(a.grpo(), high=0.05),
    "GRPO, truncated sampler ratio": a.truncate_is(a.grpo()),
    "GRPO, masked sampler ratio (IcePop)": a.mask_is(a.grpo()),
    "leave one out, sampler ratio of answers": a.truncate_is(RLOO, 1e6, sequence_product),
    "leave one out, normalised sampler ratio": a.normalized_is(RLOO, seq_mean_token_mean, 1e6, sequence_product),
}
