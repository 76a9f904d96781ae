"""What does each estimator estimate? By enumeration, not by sampling: writes docs/estimators.md.

    python experiments/estimators.py            # two to four minutes on two CPU cores; the same file each time

A language model small enough to list every group of 2 and of 3 answers gives the exact mean and variance of each
algorithm's gradient, through the library's own code: `exact/` does the sums. A new algorithm is a line in ALGORITHMS.

Reached: docs/estimators.md.
"""

import dataclasses
from pathlib import Path

import jax

import options
from exact import tables, worlds
from exact.gradients import BETA, ENTROPY, measure
from exact.language import tree
from exact.measured import Measured
from rljax import algorithms as a
from rljax.algorithms.reinforce import batch_mean, group_mean, leave_one_out, no_baseline
from rljax.algorithms.wrap import needing
from rljax.ops.kl import k1, k2, k3, k3_with_k2_gradient
from rljax.ops.ratios import sequence_product
from rljax.ops.weights import constant_length, sequence_mean, sequence_sum, token_mean
from rljax.train.log import write_atomically
from rljax.types import Algorithm

LENGTH = 3  # most tokens of an answer
WEIGHTINGS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant_length": constant_length(float(LENGTH)),
}
RLOO = a.reinforce(leave_one_out)

# A method that reads `step_ends` is paid decision by decision; the others at the end.
ALGORITHMS: dict[str, Algorithm] = {
    "REINFORCE, no baseline": a.reinforce(no_baseline),
    "REINFORCE, batch mean": a.reinforce(batch_mean),
    "REINFORCE, group mean": a.reinforce(group_mean),
    "REINFORCE, leave one out": RLOO,
    "RLOO": a.rloo(),
    "ReMax": a.remax(),
    "OPO": a.opo(),
    "OTB": a.otb(),
    "REINFORCE++": a.reinforce_pp(),
    "REINFORCE++, baseline": a.reinforce_pp_baseline(),
    "GPG": a.gpg(),
    "MaxRL": a.maxrl(),
    "Pass@k": a.pass_at_k(),
    "GRPO": a.grpo(),
    "GRPO, process": needing(a.grpo_process(), "step_ends"),
    "CAPO": needing(a.capo(), "step_ends"),
    "Dr.GRPO": a.dr_grpo(float(LENGTH)),
    "DAPO": a.dapo(),
    "DAPO, overlong filter": a.filter_overlong(a.dapo()),
    "DAPO, 80/20": a.only_high_entropy(a.dapo()),
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
    "VinePPO, exact values": a.vine_ppo(),
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
    "leave one out + distillation": a.distil(RLOO, BETA),
    "GRPO, truncated sampler ratio": a.truncate_is(a.grpo()),
    "GRPO, masked sampler ratio (IcePop)": a.mask_is(a.grpo()),
    "leave one out, sampler ratio of answers": a.truncate_is(RLOO, 1e6, sequence_product),
    "leave one out, normalised sampler ratio": a.normalised_is(RLOO, sequence_mean, 1e6, sequence_product),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is enumerated, and where the tables go."""

    vocabulary: int = 3  # tokens; one of them ends an answer
    distances: tuple[float, ...] = (0.01, 0.1, 0.5)  # KL(behaviour ‖ policy) of whole answers, nats
    odds: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)  # of an answer being right, in the table of prompts
    answers: int = 8  # of a group, in that table
    seed: int = 0  # of policies and rewards
    only: str = ""  # algorithms whose name contains this; the file then leaves out the others
    file: str = str(Path(__file__).resolve().parents[1] / "docs" / "estimators.md")  # what is written


def main(cfg: Config) -> str:
    algorithms = {name: x for name, x in ALGORITHMS.items() if cfg.only in name}
    with jax.enable_x64(True):
        lm, token, flip = tree(cfg.vocabulary, LENGTH), tree(cfg.vocabulary + 1, 1), tree(2, 1)._replace(ended=True)
        world, *off = worlds.moved(lm, cfg.seed, cfg.distances)
        token_world, *token_off = worlds.moved(token, cfg.seed, cfg.distances)
        binary, _ = worlds.random_world(lm, cfg.seed, binary=True)
        places, ways = [world, binary, *off], WEIGHTINGS.values()
        found = {G: measure(algorithms, ways, lm, places, G) for G in (2, 3)}
        plain = {name: x for name, x in algorithms.items() if "+ " not in name and "ref_logp" not in x.needs}
        odds = measure(plain, (), flip, [worlds.coin(p) for p in cfg.odds], cfg.answers)
        seen = Measured(algorithms, tuple(WEIGHTINGS), lm, world, binary, cfg.distances, found)
        parts = {
            **{"β": BETA, "c": ENTROPY, "G": cfg.answers, "distance": cfg.distances[1], "T": LENGTH},
            "own_objective": seen.own_objective(),
            "objective_by_weighting": seen.objective_by_weighting(),
            "on_policy": seen.on_policy(),
            "by_weighting": seen.by_weighting(),
            "off_policy": seen.off_policy(),
            "regularised": seen.regularised(),
            "prompts": tables.prompts(flip, odds, cfg.odds),
            "kl_of_a_token": tables.divergence(token, token_world, token_off[1]),
            "kl_of_answers": tables.divergence(lm, world, off[1]),
            "credit": tables.outcome(lm, world, binary),
            "critic": tables.critic(lm, world),
        }
    write_atomically(Path(cfg.file), text := tables.fill(parts))
    return text


if __name__ == "__main__":
    options.run(Config, main)
