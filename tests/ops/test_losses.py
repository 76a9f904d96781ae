"""Losses against verl, TRL and OpenRLHF: values and gradients; their reductions are `ops.weights`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import losses, weights
from rljax.ops.ratios import importance_ratio
from tests.ops.golden import close, golden

REDUCTIONS = {
    "token-mean": weights.token_mean,
    "seq-mean-token-mean": weights.sequence_mean,
    "seq-mean-token-sum": weights.sequence_sum,
    "seq-mean-token-sum-norm": weights.constant_length(9.0),  # verl divides by the width T
}


def value_and_gradient(terms, x, mask, reduction=weights.token_mean):
    return jax.value_and_grad(lambda x: (reduction(mask) * terms(x)).sum())(x)


def test_ratio_is_the_exponential_of_the_difference_clamped_at_20():
    old = jnp.float32([-1.0, -2.0, 0.0, -90.0])
    logp = jnp.float32([-2.0, -0.5, -90.0, 0.0])
    close(importance_ratio(logp, old), np.exp(np.clip([-1.0, 1.5, -90.0, 90.0], -20, 20)))
    slope = jax.grad(lambda x: importance_ratio(x, old).sum())(logp)
    close(slope, [np.exp(-1.0), np.exp(1.5), 0.0, 0.0])


def test_verl_ppo_clip_loss_in_every_reduction_and_mask(shared):
    """verl's dual clip (-cÂ at most where Â < 0) and its truncated importance weights are put on here."""
    clipped = 0
    for case, (hyper, ins, outs) in golden(shared, "verl_ppo_clip_loss").items():
        mask, mode = ins["response_mask"] > 0, hyper["loss_agg_mode"]
        old, adv = ins["old_log_prob"], ins["advantages"]
        low, high = hyper["clip_ratio_low"], hyper["clip_ratio_high"]

        def terms(logp, old=old, adv=adv, low=low, high=high, hyper=hyper, ins=ins):
            out = losses.clipped_surrogate(logp, old, adv, low, high)
            out = jnp.where(adv < 0, jnp.minimum(out, -hyper["clip_ratio_c"] * adv), out)
            return out * ins.get("rollout_is_weights", 1.0)

        # In January verl forgot to divide this reduction by the rows (fixed by its PR 5417).
        scale = mask.any(axis=1).sum() if mode.endswith("norm") else 1.0
        value, slope = value_and_gradient(terms, ins["log_prob"], mask, REDUCTIONS[mode])
        close(value * scale, outs["loss"], case=case)
        close(slope * scale, outs["grad_log_prob"], case=case)
        fraction = losses.clipped_fraction(ins["log_prob"], old, adv, low, high)
        close(jnp.where(mask, fraction, 0).sum() / mask.sum(), outs["metric actor/pg_clipfrac"], case=case)
        clipped += float(fraction.sum())
    assert clipped > 0


def test_trl_ppo_loss_policy_and_clipped_critic(shared):
    for case, (hyper, ins, outs) in golden(shared, "trl_ppo_loss").items():
        own, valued = ~ins["padding_mask"], ~ins["padding_mask_p1"]
        clip = hyper["cliprange"]
        policy = lambda x, ins=ins, clip=clip: losses.clipped_surrogate(  # noqa: E731
            x, ins["old_logprobs"], ins["advantages"], clip, clip
        )
        value, slope = value_and_gradient(policy, ins["new_logprobs"], own)
        close(value, outs["pg_loss"], case=case)
        close(slope, outs["grad_new_logprobs"], case=case)
        critic = lambda v, ins=ins, hyper=hyper: losses.clipped_value_loss(  # noqa: E731
            v, ins["values"], ins["returns"], hyper["cliprange_value"]
        )
        value, slope = value_and_gradient(critic, ins["vpred"], valued)
        close(value, outs["vf_loss"], case=case)
        close(hyper["vf_coef"] * slope, outs["grad_vpred"], case=case)


def test_verl_value_loss(shared):
    for case, (hyper, ins, outs) in golden(shared, "verl_value_loss").items():
        terms = lambda v, ins=ins, hyper=hyper: losses.clipped_value_loss(  # noqa: E731
            v, ins["values"], ins["returns"], hyper["cliprange_value"]
        )
        mask = ins["response_mask"] > 0
        value, slope = value_and_gradient(terms, ins["vpreds"], mask, REDUCTIONS[hyper["loss_agg_mode"]])
        close(value, outs["loss"], case=case)
        close(slope, outs["grad_vpreds"], case=case)


def test_openrlhf_value_loss_without_a_clip(shared):
    cases = {c: x for c, x in golden(shared, "openrlhf_value_loss").items() if c.endswith("clipNone")}
    assert cases
    for case, (_, ins, outs) in cases.items():
        terms = lambda v, ins=ins: losses.value_loss(v, ins["returns"])  # noqa: E731
        value, slope = value_and_gradient(terms, ins["values"], ins["action_mask"] > 0)
        close(value, outs["loss"], case=case)
        close(slope, outs["grad_values"], case=case)


def test_verl_gpg_loss_is_the_plain_policy_gradient(shared):
    for case, (hyper, ins, outs) in golden(shared, "verl_gpg_loss").items():
        terms = lambda x, ins=ins: losses.policy_gradient(x, ins["advantages"])  # noqa: E731
        mask = ins["response_mask"] > 0
        value, slope = value_and_gradient(terms, ins["log_prob"], mask, REDUCTIONS[hyper["loss_agg_mode"]])
        close(value, outs["loss"], case=case)
        close(slope, outs["grad_log_prob"], case=case)


@pytest.mark.parametrize("advantage", [-1.3, 0.4])
def test_on_policy_the_surrogate_has_the_gradient_of_the_policy_gradient(advantage):
    logp, adv = jnp.float32([-0.3, -5.0]), jnp.full(2, advantage)
    slopes = [
        jax.grad(lambda x: losses.clipped_surrogate(x, logp, adv).sum())(logp),
        jax.grad(lambda x: losses.policy_gradient(x, adv).sum())(logp),
    ]
    close(*slopes)
    close(slopes[0], [-advantage] * 2)


def test_advantages_returns_and_old_quantities_are_constants():
    x = jnp.float32([0.1, -0.4])
    for loss in (
        lambda c: losses.clipped_surrogate(x, c, x),
        lambda c: losses.clipped_surrogate(x, x, c),
        lambda c: losses.policy_gradient(x, c),
        lambda c: losses.value_loss(x, c),
        lambda c: losses.clipped_value_loss(x, c, x + 1),
        lambda c: losses.clipped_value_loss(x, x + 1, c),
    ):
        np.testing.assert_array_equal(jax.grad(lambda c, loss=loss: loss(c).sum())(x + 0.05), 0.0)
