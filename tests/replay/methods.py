"""TRL's trainers as ours: the tables from its names to our functions, and the optimizer.

A `Method` says how a window of micro-batches becomes an optimizer batch and which objective learns from it. What TRL
computes otherwise stands in tests/dialects.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.common.algorithms import critic_free
from experiments.common.preference_methods import METHODS
from experiments.sft import LOSSES
from rljax import algorithms as a
from rljax.algorithms.aot import aot, aot_unpaired
from rljax.algorithms.common import controllers
from rljax.algorithms.common.pairs import preference_objective, uniform_token_weights
from rljax.algorithms.dpo import chosen_nll, dpo, f_divergence, ld_dpo_weights, mean_log_ratio, uniform_pair_weight, wpo
from rljax.models.decoder import DecoderConfig
from rljax.models.families import read_raw
from rljax.models.param_filters import decay_mask
from rljax.models.policy import make_annotate, make_policy
from rljax.ops import preferences
from rljax.train.objective import policy_objective
from rljax.types import Algorithm, Objective, Params, TrainState
from tests import dialects
from tests.golden.entry import Case
from tests.golden.losses import trl_policy, trl_reduction, trl_two_sided
from tests.golden.preferences import trl_term
from tests.replay import batches
from tests.replay.arguments import choose


class Method(NamedTuple):
    """How one of TRL's trainers is replayed."""

    objective: Callable  # (number of micro-batches) -> Objective
    batch: Callable  # (state, window, rows, columns) -> the optimizer batch of these micro-batches
    start: dict  # coefficients of the training state
    follow: Callable  # (state, metrics) -> state: what a controller does after a step


def method_of(trainer: str, policy: Callable, args: SimpleNamespace, initial: Params, uneven: bool) -> Method:
    """uneven: micro-batches differ in their rows."""
    if trainer == "sft":
        return sft_method(policy, args)
    if trainer == "dpo":
        return dpo_method(policy, args, initial, uneven)
    return grpo_method(policy, args)


def policy_of(directory: Path, config: DecoderConfig) -> Callable:
    """The model as transformers differentiates it."""
    pad = read_raw(directory).get("pad_token_id")
    if pad is None:
        return make_policy(config)
    return dialects.transformers_padding_row(
        make_policy(replace(config, tie_word_embeddings=False)), config.tie_word_embeddings, pad
    )


def unchanged(state: TrainState, metrics: dict) -> TrainState:
    return state


# ----------------------------------------------------------------------------------------------------------------- SFT

SFT = {"nll": LOSSES["sft"], "chunked_nll": LOSSES["sft"], "dft": LOSSES["dft"]}  # what sft.py learns by


def sft_method(policy: Callable, args: SimpleNamespace) -> Method:
    """TRL divides by the tokens of all the window's micro-batches, as we do; where the recording tells another number
    of them it holds."""
    algorithm = choose(SFT, "loss_type", args.loss_type)()

    def batch(state, window, rows, columns):
        trajs = [batches.sft_traj(micro) for micro in window]
        whole = algorithm.credit(batches.stack(trajs, rows, columns), {})
        told = window[0].get("num_items_in_batch", whole.mask.sum())
        share = jnp.full(whole.mask.shape, whole.mask.sum() / jnp.maximum(told, 1))
        return whole.replace(extra={"share": share})

    objective = policy_objective(policy, dialects.trl_token_count(algorithm))
    return Method(lambda count: objective, batch, {}, unchanged)


# ----------------------------------------------------------------------------------------------------------------- DPO

SLOPES = {
    "reverse_kl": preferences.reverse_kl,
    "forward_kl": preferences.forward_kl,
    "js_divergence": preferences.jensen_shannon,
    "alpha_divergence": preferences.alpha_divergence,
}
MATCHED = {"aot": aot, "aot_unpaired": aot_unpaired}
OF_RATIOS = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop"),
)


def dpo_objective(policy: Callable, args: SimpleNamespace, loss_type: str) -> Objective:
    """One of TRL's losses. Only some of TRL's take an f-divergence; it refuses the others itself."""
    choose(dict.fromkeys((*OF_RATIOS, *MATCHED, "sft")), "loss_type", loss_type)
    if loss_type == "sft":
        return preference_objective(policy, chosen_nll, lambda answer: args.beta * answer.log_ratio)
    if loss_type in MATCHED:
        return MATCHED[loss_type](policy, args.beta, args.label_smoothing)
    slope = choose(SLOPES, "f_divergence_type", args.f_divergence_type)
    if loss_type == "sigmoid" and is_plain_dpo(args):
        return METHODS["sigmoid"].make(policy, args.beta)  # what dpo.py learns by
    if slope is preferences.alpha_divergence:
        slope = dialects.trl_alpha_divergence(args.f_alpha_divergence_coef)
    loss, measure = trl_term(loss_type, vars(args))
    of_whole = f_divergence(slope)
    per_token = lambda answer: of_whole(answer) / answer.length  # noqa: E731
    return dpo(
        policy,
        loss,
        args.beta,
        measure=per_token if measure is mean_log_ratio else of_whole,
        pair_weight=wpo if args.use_weighting else uniform_pair_weight,
        token_weights=uniform_token_weights if args.ld_alpha is None else ld_dpo_weights(args.ld_alpha),
    )


def is_plain_dpo(args: SimpleNamespace) -> bool:
    """Whether the run asks for none of TRL's additions to DPO."""
    additions = (args.use_weighting, args.label_smoothing, args.ld_alpha is not None)
    return args.f_divergence_type == "reverse_kl" and not any(additions)


def dpo_method(policy: Callable, args: SimpleNamespace, initial: Params, uneven: bool) -> Method:
    """Where the recording has no log-probs of the reference it is the policy that the run starts from."""
    parts = [dpo_objective(policy, args, name) for name in args.loss_type]
    summed = dialects.trl_sum(*zip(args.loss_weights, parts, strict=True))
    whole = parts[0] if args.loss_weights == [1.0] else summed
    alone = uneven or {"sft", *MATCHED} & set(args.loss_type)
    annotate = make_annotate(policy, ("ref_logp",))

    def batch(state, window, rows, columns):
        pairs = batches.stack([batches.dpo_pairs(micro) for micro in window], rows, columns)
        if pairs.chosen.ref_logp is not None:
            return pairs
        choose({False: 1}, "sync_ref_model (the reference's log-probs are not recorded)", args.sync_ref_model)
        state = state.replace(frozen={"reference": initial})
        return pairs.replace(chosen=annotate(state, pairs.chosen), rejected=annotate(state, pairs.rejected))

    def objective(count):
        return dialects.trl_prepared_alone(whole, count) if alone and count > 1 else whole

    return Method(objective, batch, {}, unchanged)


# ---------------------------------------------------------------------------------------------------------------- GRPO

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def grpo_case(args: SimpleNamespace) -> Case:
    """The arguments under the names that the golden files give them."""
    hyper = {
        "loss_type": args.loss_type,
        "epsilon_low": args.epsilon,
        "epsilon_high": args.epsilon_high,
        "args.delta": args.delta,
        "importance_sampling_level": args.importance_sampling_level,
        "max_completion_length": args.max_completion_length,
        "args.sapo_temperature_pos": args.sapo_temperature_pos,
        "args.sapo_temperature_neg": args.sapo_temperature_neg,
    }
    return Case("", hyper, ins={}, outs={}, width=0)


def grpo_policy(args: SimpleNamespace) -> Algorithm:
    """The loss without its additions. TRL's delta is for the clipped ones."""
    choose(dict.fromkeys((*CLIPPED, "cispo", "sapo", "vespo")), "loss_type", args.loss_type)
    if args.loss_type == "vespo":
        return a.vespo((args.vespo_k_pos, args.vespo_lambda_pos), (args.vespo_k_neg, args.vespo_lambda_neg))
    if args.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo") and is_plain_grpo(args):
        return critic_free(args.max_completion_length)["grpo"]()  # what grpo.py learns by; the reduction is TRL's
    two_sided = args.delta is not None and args.loss_type in CLIPPED
    return (trl_two_sided if two_sided else trl_policy)(grpo_case(args))


def is_plain_grpo(args: SimpleNamespace) -> bool:
    """Whether the run clips the ratio of each token at GRPO's own 0.2."""
    clips = {args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high}
    return clips == {0.2} and args.importance_sampling_level == "token" and args.delta is None


def has_bonus(args: SimpleNamespace) -> bool:
    return args.entropy_coef != 0 or args.use_adaptive_entropy


def grpo_algorithm(args: SimpleNamespace) -> Algorithm:
    algorithm = grpo_policy(args)
    if args.beta != 0:
        with_kl = a.with_importance_weighted_kl if args.use_bias_correction_kl else a.with_kl
        algorithm = with_kl(algorithm, args.beta)
    if args.off_policy_mask_threshold is not None:
        algorithm = a.off_policy_sequence_mask(algorithm, args.off_policy_mask_threshold)
    if args.top_entropy_quantile < 1:
        algorithm = a.high_entropy_mask(algorithm, args.top_entropy_quantile)
    if args.importance_sampling_level == "sequence":
        algorithm = dialects.trl_one_ratio_a_row(algorithm)
    algorithm = dialects.trl_token_count(algorithm._replace(weights=trl_reduction(grpo_case(args))))
    return dialects.trl_entropy_bonus(algorithm, args.entropy_coef) if has_bonus(args) else algorithm


def grpo_method(policy: Callable, args: SimpleNamespace) -> Method:
    """Where the recording has no log-probs of the old policy, that is the policy before this step."""
    objective = policy_objective(policy, grpo_algorithm(args))
    annotate = make_annotate(policy, ("old_logp",))
    alone = args.loss_type == "bnpo" or args.top_entropy_quantile < 1 or has_bonus(args)

    def batch(state, window, rows, columns):
        shares = batches.grpo_shares(window, args, alone)
        parts = [batches.grpo_batch(micro, args, share) for micro, share in zip(window, shares, strict=True)]
        whole = batches.stack(parts, rows, columns)
        if whole.traj.old_logp is None:
            traj = annotate(state, whole.traj)
            whole = whole.replace(traj=traj.replace(logp=traj.old_logp))
        return whole.replace(coefficients=applied(state.coefficients))

    def applied(coefficients):
        if not args.use_adaptive_entropy:
            return {}
        last = coefficients["last_entropy"]
        return {"entropy": controllers.applied_entropy_coefficient(coefficients["entropy"], last, args.entropy_target)}

    def follow(state, metrics):
        limits = (args.entropy_target, args.entropy_coef_delta, args.entropy_coef_min, args.entropy_coef_max)
        moved = controllers.adaptive_entropy(state.coefficients["entropy"], metrics["entropy"], *limits)
        return state.replace(coefficients={"entropy": moved, "last_entropy": metrics["entropy"]})

    adaptive = args.use_adaptive_entropy
    return Method(
        lambda count: dialects.trl_prepared_alone(objective, count) if alone and count > 1 else objective,
        batch,
        {"entropy": jnp.asarray(args.entropy_coef), "last_entropy": jnp.asarray(jnp.inf)} if adaptive else {},
        follow if adaptive else unchanged,
    )


# ----------------------------------------------------------------------------------------------------------- optimizer


def adamw(rate, args: SimpleNamespace) -> optax.GradientTransformation:
    moments = {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
    return optax.adamw(rate, **moments, weight_decay=args.weight_decay, mask=decay_mask)


def decayed_first(scaling: optax.GradientTransformation) -> Callable:
    """torch's other optimizers add the decay to the gradient."""

    def make(rate, args):
        return optax.chain(
            optax.add_decayed_weights(args.weight_decay, decay_mask), scaling, optax.scale_by_learning_rate(rate)
        )

    return make


OPTIMIZERS = {  # with torch's constants: optim_args are refused
    "adamw_torch": adamw,
    "adamw_torch_fused": adamw,
    "sgd": decayed_first(optax.identity()),
    "adagrad": decayed_first(optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)),
    "rmsprop": decayed_first(optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)),
}


def least_gradient() -> optax.GradientTransformation:
    """Passes gradients on; its state is the smallest that each entry ever had, 0 apart, over the largest of its tensor.
    Where float32 cannot tell size or sign of that, Adam makes a step of full size of the rounding."""

    def init(params):
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), params)

    def share(least, gradient):
        size = jnp.abs(gradient)
        return jnp.where(size > 0, jnp.minimum(least, size / size.max()), least)

    return optax.GradientTransformation(
        init, lambda grads, state, params=None: (grads, jax.tree.map(share, state, grads))
    )


def optimizer_of(args: SimpleNamespace, rates: list[float]) -> optax.GradientTransformation:
    """`rates`: the learning rate of each step. The first of its states is `least_gradient`'s."""
    rate = rates[0] if len(set(rates)) == 1 else lambda step: jnp.asarray(rates)[step]
    made = choose(OPTIMIZERS, "optim", str(args.optim))(rate, args)
    clip = optax.clip_by_global_norm(args.max_grad_norm) if args.max_grad_norm else optax.identity()
    return optax.chain(least_gradient(), clip, made)
