"""The adaptive coefficients of a recipe, kept in `TrainState.coefficients`: of the KL term and of the entropy bonus."""

import math

import jax.numpy as jnp

from experiments.common.settings import Controllers, Server
from rljax.algorithms import with_entropy
from rljax.algorithms.common.controllers import adaptive_entropy, adaptive_kl, applied_entropy_coefficient
from rljax.types import Algorithm, Array, TrainState


def check_target(cfg: Controllers, server: Server) -> None:
    """Raise ValueError where the KL to be controlled would be that of a server's own policy, which stays as it is."""
    if cfg.kl_target is not None and server.url and server.weights == "keep":
        raise ValueError(
            f"controllers.kl_target = {cfg.kl_target} follows the KL of the policy that samples, and here that is a "
            "server's with weights of its own; legal: --server.weights push, or no kl_target"
        )


def with_controlled_terms(algorithm: Algorithm, cfg: Controllers) -> Algorithm:
    """The algorithm with the entropy bonus, if there is a target for it."""
    return algorithm if cfg.entropy_target is None else with_entropy(algorithm, 0.0)


def initial_coefficients(cfg: Controllers, kl_coef: float, kl_in_reward: bool = False) -> dict[str, Array]:
    """The first `TrainState.coefficients`: that of the KL is the one of `kl_in_reward`, or else of `with_kl`."""
    coefficients = {}
    if cfg.kl_target is not None:
        coefficients["kl_reward" if kl_in_reward else "kl"] = jnp.float32(kl_coef)
    if cfg.entropy_target is not None:
        coefficients |= {"entropy": jnp.float32(0.0), "last_entropy": jnp.float32(jnp.inf)}
    return coefficients


def applied_coefficients(cfg: Controllers, coefficients: dict[str, Array]) -> dict[str, Array]:
    """Those that `credit` puts into the batch: no entropy bonus while the entropy is above its target."""
    if cfg.entropy_target is None:
        return coefficients
    others = {name: value for name, value in coefficients.items() if name != "last_entropy"}
    bonus = applied_entropy_coefficient(coefficients["entropy"], coefficients["last_entropy"], cfg.entropy_target)
    return others | {"entropy": bonus}


def adapt(cfg: Controllers, state: TrainState, metrics: dict, samples: int) -> tuple[TrainState, dict]:
    """The state with coefficients moved by the metrics of a step of so many completions; the metrics with theirs.

    A step without a decision has no entropy: the coefficient stays, and what the next step compares with its target.
    Raises ValueError where the algorithm has no KL term whose coefficient could be changed.
    """
    coefficients = dict(state.coefficients)
    shown = {}
    if cfg.kl_target is not None:
        term = "kl_reward" if "kl_reward" in coefficients else "kl"
        if term == "kl" and "kl" not in metrics:
            raise ValueError("kl_target changes the coefficient of with_kl, which this algorithm does not have")
        shown["kl_coef"] = coefficients[term]
        measured = metrics["kl_sequence"]
        coefficients[term] = adaptive_kl(coefficients[term], measured, cfg.kl_target, cfg.kl_horizon, samples)
    if cfg.entropy_target is not None:
        shown["entropy_coef"] = coefficients["entropy"]
        if not math.isnan(metrics["entropy"]):
            entropy = jnp.float32(metrics["entropy"])
            moved = adaptive_entropy(coefficients["entropy"], entropy, cfg.entropy_target, cfg.entropy_delta)
            coefficients |= {"entropy": moved, "last_entropy": entropy}
    return state.replace(coefficients=coefficients), metrics | shown
