"""The optimizer of a recipe: AdamW after clipping, with a learning-rate schedule."""

import dataclasses
import math

import jax.numpy as jnp
import optax

from experiments.common.settings import Optimizer
from rljax.models import param_filters
from rljax.types import Params

CRITIC = ("critic", "value_head")  # entries of the parameters


def make_optimizer(settings: Optimizer, updates: int) -> optax.GradientTransformation:
    """The optax chain of these settings; its schedule ends after `updates`. Raises as `check_optimizer` does."""
    check_optimizer(settings)
    decayed = param_filters.decay_mask if settings.weight_decay else None
    adam = optax.adamw(
        learning_rate(settings, updates), b2=settings.beta2, weight_decay=settings.weight_decay, mask=decayed
    )
    return optax.chain(clip_by_global_norm(settings.max_grad_norm), adam)


def make_actor_critic_optimizer(
    settings: Optimizer, critic_learning_rate: float, updates: int, params: Params
) -> optax.GradientTransformation:
    """Two optimizers that differ in their learning rate, each with its own clipping: the critic's (of its decoder, or
    of its head on the policy's decoder) and the policy's.
    """
    critic = dataclasses.replace(settings, learning_rate=critic_learning_rate)
    parts = {"policy": make_optimizer(settings, updates), "critic": make_optimizer(critic, updates)}
    return optax.partition(parts, {name: "critic" if name in CRITIC else "policy" for name in params})


def check_optimizer(settings: Optimizer) -> None:
    """Raise ValueError for numbers with which nothing is learned, the loss is climbed, or parameters become NaN."""
    legal = {
        "learning_rate": (settings.learning_rate >= 0, "at least 0"),
        "warmup_steps": (settings.warmup_steps >= 0, "at least 0"),
        "max_grad_norm": (settings.max_grad_norm > 0, "above 0; 1e9 clips nothing"),
        "weight_decay": (settings.weight_decay >= 0, "at least 0"),
        "beta2": (0 <= settings.beta2 < 1, "at least 0 and below 1"),
    }
    for name, (is_legal, words) in legal.items():
        value = getattr(settings, name)
        if not (is_legal and math.isfinite(value)):
            raise ValueError(f"optimizer.{name} = {value}; legal: {words}")


def learning_rate(settings: Optimizer, updates: int) -> optax.Schedule:
    """Linear warmup, then the schedule that the settings name."""
    highest = settings.learning_rate
    rest = max(updates - settings.warmup_steps, 1)
    schedules = {
        "constant": optax.constant_schedule(highest),
        "cosine": optax.cosine_decay_schedule(highest, rest),
        "linear": optax.linear_schedule(highest, 0.0, rest),
    }
    warmup = optax.linear_schedule(highest / (settings.warmup_steps + 1), highest, settings.warmup_steps)
    return optax.join_schedules([warmup, schedules[settings.schedule]], [settings.warmup_steps])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients whose global norm exceeds `max_norm` down to it.

    optax.clip_by_global_norm divides 0 by 0 where the gradient is zero (a batch without signal): `--debug` stops there.
    """

    def clip(updates, params=None):
        return optax.tree.scale(max_norm / jnp.maximum(optax.tree.norm(updates), max_norm), updates)

    return optax.stateless(clip)
