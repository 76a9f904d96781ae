"""One paper, one file, one function that returns an Algorithm (preferences and reward models: an Objective).

`wrap`, `shape` and `correct` change an Algorithm: terms in the loss, rewards and rows, sampler corrections.
"""

from rljax.algorithms.a_star_po import a_star_po
from rljax.algorithms.aot import aot, aot_unpaired
from rljax.algorithms.bco import bco
from rljax.algorithms.capo import capo
from rljax.algorithms.cispo import cispo
from rljax.algorithms.common.corrections import (
    high_entropy_mask,
    mask_is,
    normalized_is,
    off_policy_sequence_mask,
    reject,
    truncate_is,
)
from rljax.algorithms.common.reward_shaping import distill, filter_overlong, kl_in_reward, overlong_penalty
from rljax.algorithms.common.wrappers import (
    with_entropy,
    with_importance_weighted_kl,
    with_kl,
    with_positive_nll,
)
from rljax.algorithms.covariance import clip_cov, kl_cov
from rljax.algorithms.cpo import cpo, simpo
from rljax.algorithms.dapo import dapo
from rljax.algorithms.dpo import dpo
from rljax.algorithms.dppo import dppo_kl, dppo_tv
from rljax.algorithms.dqn import dqn
from rljax.algorithms.dr_grpo import dr_grpo
from rljax.algorithms.dro import dro
from rljax.algorithms.fipo import fipo
from rljax.algorithms.gdpo import gdpo
from rljax.algorithms.gmpo import gmpo
from rljax.algorithms.gpg import gpg
from rljax.algorithms.grpo import grpo
from rljax.algorithms.grpo_pass_at_k import grpo_pass_at_k
from rljax.algorithms.grpo_process import grpo_process
from rljax.algorithms.gspo import gspo, gspo_token
from rljax.algorithms.kto import kto
from rljax.algorithms.lite_ppo import lite_ppo
from rljax.algorithms.luspo import luspo
from rljax.algorithms.maxrl import maxrl
from rljax.algorithms.online_dpo import online_pairs
from rljax.algorithms.opo import opo
from rljax.algorithms.orpo import orpo
from rljax.algorithms.otb import otb
from rljax.algorithms.ppo import ppo, ppo_penalty
from rljax.algorithms.process_reward_model import process_reward_model
from rljax.algorithms.real import real
from rljax.algorithms.reinforce import reinforce, reinforce_to_go
from rljax.algorithms.reinforce_ada import reinforce_ada
from rljax.algorithms.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from rljax.algorithms.remax import remax
from rljax.algorithms.reward_model import ranked_reward_model, reward_model
from rljax.algorithms.rloo import rloo
from rljax.algorithms.sapo import sapo
from rljax.algorithms.sft import dft, sft
from rljax.algorithms.trpo import trpo, trpo_gae
from rljax.algorithms.vapo import vapo
from rljax.algorithms.vespo import vespo
from rljax.algorithms.vine_ppo import vine_ppo
from rljax.algorithms.vpg import vpg
from rljax.algorithms.vtrace import off_policy_pg, vtrace
