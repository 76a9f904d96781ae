"""The methods of online_dpo.py: what each makes of a rollout, and by which objective it learns from that."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from experiments.common import train
from experiments.common.preference_methods import PAIR_METHODS, PairLoss
from experiments.common.settings import Batches, Rare
from rljax import algorithms as a
from rljax.algorithms.common.reward_shaping import penalize_missing_eos
from rljax.models import decoder, mixtures
from rljax.models.decoder import DecoderConfig
from rljax.train.objective import policy_objective
from rljax.types import Objective, PolicyFn


@dataclasses.dataclass(frozen=True)
class Preference:
    """How completions are compared and learned from."""

    loss: PairLoss = "sigmoid"  # of online_dpo: any that dpo.py has for pairs
    beta: float | None = None  # β of the loss, τ of nash_md; default: that of the method's paper
    missing_eos_penalty: Rare[float] = 0.0  # taken from the reward of a completion that was cut, for online_dpo
    xpo_alpha: Rare[float] = 1e-5  # coefficient of XPO's bonus
    nash_mixture: Rare[float] = 0.5  # the reference's share of the mixture that nash_md plays against


class Method(NamedTuple):
    """What is learned from a rollout, and by which objective."""

    objective: Objective
    make_batch: Callable  # (rollout, the opponent's rollout) -> the batch of the objective
    rows: Batches  # sizes of that batch
    completions_per_row: int  # 2: a row is a pair
    opponent: Callable | None = None  # (state) -> model and parameters that complete the same prompts


def online_dpo(preference: Preference, batches: Batches, config: DecoderConfig, model: PolicyFn) -> Method:
    """The best completion of each prompt against the worst."""
    n = batches.num_generations
    if n < 2:
        raise ValueError(f"num_generations = {n}: a pair is made of two completions of a prompt; legal: at least 2")

    @jax.jit
    def make_pairs(traj, other):
        if preference.missing_eos_penalty:
            traj = penalize_missing_eos(traj, preference.missing_eos_penalty)
        return a.online_pairs(traj, n)

    method = PAIR_METHODS[preference.loss]
    objective = method.make(model, method.beta if preference.beta is None else preference.beta)
    return Method(objective, make_pairs, dataclasses.replace(batches, num_generations=1), 2)


def xpo(preference: Preference, batches: Batches, config: DecoderConfig, model: PolicyFn) -> Method:
    """The policy's completion against the reference's."""
    lm = decoder.language_model(config)
    beta = 0.1 if preference.beta is None else preference.beta
    objective = a.xpo(model, beta=beta, alpha=preference.xpo_alpha)
    return Method(objective, jax.jit(a.xpo_pairs), batches, 2, lambda state: (lm, state.frozen["reference"]))


def nash_md(preference: Preference, batches: Batches, config: DecoderConfig, model: PolicyFn) -> Method:
    """The policy's completion against the mixture's."""
    algorithm = a.nash_md(0.1 if preference.beta is None else preference.beta)
    train.check_algorithm(algorithm, batches, "nash_md")
    mixture = mixtures.geometric_mixture(config, preference.nash_mixture)

    @jax.jit
    def credit(traj, other):
        return algorithm.credit(traj.replace(rewards=a.preference_over(traj, other)), {})

    return Method(policy_objective(model, algorithm), credit, batches, 1, lambda state: (mixture, state.params))


METHODS = {"online_dpo": online_dpo, "xpo": xpo, "nash_md": nash_md}
READ = {  # the settings of each
    "online_dpo": ("loss", "beta", "missing_eos_penalty"),
    "xpo": ("beta", "xpo_alpha"),
    "nash_md": ("beta", "nash_mixture"),
}


def check_preference(method: str, preference: Preference) -> None:
    """Raise ValueError for a setting that this method does not read."""
    for field in dataclasses.fields(preference):
        value = getattr(preference, field.name)
        if value != field.default and field.name not in READ[method]:
            raise ValueError(
                f"preference.{field.name} = {value!r}, which {method} does not read; it reads {', '.join(READ[method])}"
            )
