"""The methods of dpo.py by name: what each optimizes, from what rows, with its own default β."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from rljax import algorithms
from rljax.algorithms.dpo import f_divergence, ld_dpo_weights, mean_log_ratio, wpo
from rljax.algorithms.kto import balanced_class_weights
from rljax.ops import preferences
from rljax.types import Objective, PolicyFn


class Method(NamedTuple):
    """A method that learns from preferences."""

    make: Callable[[PolicyFn, float], Objective]  # (policy, β) -> objective
    beta: float  # the one of its paper or of its authors' code
    rows: Literal["pairs", "rated pairs", "pairs with gold", "judgments"] = "pairs"
    reference: bool = True  # compares with the model as it was at the start
    mismatched: bool = False  # wants each prompt with another prompt's completion (KTO's z)


def of_dpo(loss: Callable = preferences.sigmoid, beta: float = 0.1, **arguments) -> Method:
    """A member of the DPO family."""

    def make(policy: PolicyFn, beta: float) -> Objective:
        return algorithms.dpo(policy, loss, beta, **arguments)

    return Method(make, beta)


def of_pairs(make: Callable, beta: float, **facts) -> Method:
    """A method that has a function of its own (policy, beta=) -> objective."""
    return Method(lambda policy, beta: make(policy, beta=beta), beta, **facts)


def orpo(policy: PolicyFn, beta: float) -> Objective:
    """ORPO, whose λ TRL calls β."""
    return algorithms.orpo(policy, lam=beta)


METHODS = {
    # functions of the difference of log-ratios
    "sigmoid": of_dpo(),
    "cdpo": of_dpo(partial(preferences.sigmoid, label_smoothing=0.1)),
    "robust": of_dpo(preferences.robust),
    "hinge": of_dpo(preferences.hinge),
    "ipo": of_dpo(preferences.ipo, measure=mean_log_ratio),
    "exo_pair": of_dpo(preferences.exo_pair),
    "discopop": of_dpo(preferences.discopop, 0.05),
    "sigmoid_norm": of_dpo(beta=5.0, measure=mean_log_ratio),
    # functions of each completion's own log-ratio
    "nca_pair": of_dpo(preferences.nca_pair, 0.01),
    "bco_pair": of_dpo(preferences.bco_pair),
    "sppo_hard": of_dpo(preferences.sppo_hard, 0.001),
    "apo_zero": of_dpo(preferences.apo_zero),
    "apo_down": of_dpo(preferences.apo_down),
    "dpop": of_pairs(algorithms.dpop, 0.3),
    # other divergences from the reference
    "forward_kl": of_dpo(measure=f_divergence(preferences.forward_kl)),
    "js_divergence": of_dpo(measure=f_divergence(preferences.jensen_shannon)),
    "alpha_divergence": of_dpo(measure=f_divergence(preferences.alpha_divergence)),
    # other weights, other terms
    "rpo": of_dpo(nll=1.0),
    "wpo": of_dpo(pair_weight=wpo),
    "ld_dpo": of_dpo(token_weights=ld_dpo_weights(0.3)),
    "odpo": of_pairs(algorithms.odpo, 0.1, rows="rated pairs"),
    "aot": of_pairs(algorithms.aot, 0.1),
    "aot_unpaired": of_pairs(algorithms.aot_unpaired, 0.1),
    # without a reference
    "cpo": of_pairs(algorithms.cpo, 0.1, reference=False),
    "simpo": of_pairs(algorithms.simpo, 2.0, reference=False),
    "alphapo": of_pairs(partial(algorithms.simpo, alpha=0.25), 2.0, reference=False),
    "orpo": Method(orpo, 0.1, reference=False),
    "tpo": of_pairs(algorithms.tpo, 0.01, rows="pairs with gold", reference=False),
    "tpo_l": of_pairs(algorithms.tpo_l, 2.0, rows="pairs with gold", reference=False),
    # completions judged one by one
    "kto": of_pairs(algorithms.kto, 0.1, rows="judgments", mismatched=True),
    "kto_balanced": of_pairs(
        partial(algorithms.kto, class_weights=balanced_class_weights()), 0.1, rows="judgments", mismatched=True
    ),
    "apo_zero_unpaired": of_pairs(algorithms.kto, 0.1, rows="judgments"),
    "bco": of_pairs(algorithms.bco, 0.1, rows="judgments"),
}
PAIR_METHODS = {name: method for name, method in METHODS.items() if method.rows == "pairs"}
PairLoss = Literal[tuple(PAIR_METHODS)]
