"""Losses of one comparison, to be minimized, unreduced: the DPO family.

`chosen` and `rejected` are Δ_w and Δ_l: log π/π_ref of the better and of the worse completion, summed over their
tokens. β Δ is the implicit reward, D = Δ_w - Δ_l. One function serves several papers, depending on its inputs: means
over the tokens (length-normalized DPO, arXiv:2411.15124; IPO as its authors run it), log π itself (reference-free;
CPO), f'(π/π_ref) (f-DPO). Bind hyperparameters with `functools.partial`. The `…_loss` functions are named apart from
the objectives of `rljax.algorithms` with the paper's name.

Left out: soft preference probabilities from a judge (SPPO's own), n-way EXO and NCA. Exponents are clamped at 80, below
the overflow of float32, with no gradient beyond.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
from jax.nn import sigmoid as logistic
from jaxtyping import Array, Bool

from rljax.ops.shapes import PerRow, PerToken, Scalar, TokenMask

PreferenceLoss = Callable[[PerRow, PerRow, Scalar], PerRow]  # (chosen, rejected, β) -> loss of each pair


def _exp(x):
    return jnp.exp(jnp.minimum(x, 80.0))


def _expm1(x):
    return jnp.expm1(jnp.minimum(x, 80.0))


# ------------------------------------------------------------------------------------------------- of the difference D


def label_smoothed(x: PerRow, label_smoothing: Scalar = 0.0) -> PerRow:
    """-(1 - ε) log σ(x) - ε log σ(-x): logistic loss where a share ε of the labels is wrong (cDPO, Mitchell 2023)."""
    return -(1.0 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def sigmoid(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1, label_smoothing: Scalar = 0.0) -> PerRow:
    """-log σ(β D) (DPO, arXiv:2305.18290, eq. 7); cDPO with `label_smoothing`."""
    return label_smoothed(beta * (chosen - rejected), label_smoothing)


def robust(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1, label_smoothing: Scalar = 0.1) -> PerRow:
    """[-(1 - ε) log σ(β D) + ε log σ(-β D)]/(1 - 2ε), ε < ½: unbiased under flipped labels, unbounded below
    (arXiv:2403.00409)."""
    x = beta * (chosen - rejected)
    clean = (1.0 - label_smoothing) * log_sigmoid(x)
    flipped = label_smoothing * log_sigmoid(-x)
    return (flipped - clean) / (1.0 - 2.0 * label_smoothing)


def odpo_loss(chosen: PerRow, rejected: PerRow, offset: PerRow, beta: Scalar = 0.1) -> PerRow:
    """-log σ(β D - offset), 0 for an offset of -∞ (ODPO, arXiv:2402.10571)."""
    return -log_sigmoid(beta * (chosen - rejected) - offset)


def hinge(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1) -> PerRow:
    """max(0, 1 - β D) (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


def ipo(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1) -> PerRow:
    """(D - 1/(2β))² (IPO, arXiv:2310.12036, eq. 17, β = τ). The authors' runs give it means over the tokens."""
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def exo_pair(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1, label_smoothing: float = 1e-3) -> PerRow:
    """KL of (σ(β D), σ(-β D)) from (1 - ε, ε) (EXO, arXiv:2402.00856, eq. 16).

    Raises ValueError for ε = 0, where the loss is infinite.
    """
    if label_smoothing == 0:
        raise ValueError("exo_pair needs label_smoothing > 0: its target is (1 - ε, ε), and the paper takes ε = 1e-3")
    x = beta * (chosen - rejected)
    better = logistic(x) * (log_sigmoid(x) - jnp.log1p(-label_smoothing))
    return better + logistic(-x) * (log_sigmoid(-x) - jnp.log(label_smoothing))


def discopop(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1, tau: Scalar = 0.05) -> PerRow:
    """(1 - q)(-log σ(β D)) + q e^{-β D}, q = σ(β D/τ) (arXiv:2406.08414, eq. 5)."""
    x = beta * (chosen - rejected)
    return -logistic(-x / tau) * log_sigmoid(x) + _exp(log_sigmoid(x / tau) - x)  # q e⁻ˣ as one exponential


# -------------------------------------------------------------------------------------- of each completion's own ratio


def dpop_loss(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.3, lam: Scalar = 50.0) -> PerRow:
    """-log σ(β(D - λ max(0, -Δ_w))): a penalty on a chosen completion less likely than under the reference (DPOP,
    arXiv:2402.13228, eq. 3)."""
    penalty = jax.nn.relu(-chosen)
    return -log_sigmoid(beta * (chosen - rejected - lam * penalty))


def nca_pair(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.01) -> PerRow:
    """-log σ(β Δ_w) - ½ log σ(-β Δ_w) - ½ log σ(-β Δ_l) (NCA, arXiv:2402.05369)."""
    x = beta * chosen
    y = beta * rejected
    return -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y)


def bco_pair(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1) -> PerRow:
    """-log σ(β Δ_w) - log σ(-β Δ_l) (arXiv:2404.04656, without the shift δ)."""
    return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)


def sppo_hard(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1) -> PerRow:
    """(Δ_w - 1/(2β))² + (Δ_l + 1/(2β))² (SPPO, arXiv:2405.00675, eq. 4.7 with probabilities 1 and 0)."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1) -> PerRow:
    """1 - σ(β Δ_w) + σ(β Δ_l): for chosen completions better than the model's (APO, arXiv:2408.06266, eq. 7)."""
    return logistic(-beta * chosen) + logistic(beta * rejected)


def apo_down(chosen: PerRow, rejected: PerRow, beta: Scalar = 0.1) -> PerRow:
    """σ(β Δ_w) + 1 - σ(β D): for chosen completions worse than the model's (APO, arXiv:2408.06266, eq. 8)."""
    return logistic(beta * chosen) + logistic(-beta * (chosen - rejected))


def mixture(*parts: tuple[float, Callable]) -> Callable:
    """Σ w_k L_k of the parts (w_k, L_k): losses that take the same arguments."""

    def loss(*args):
        return sum(weight * part(*args) for weight, part in parts)

    return loss


# ------------------------------------------------------------------------------------------------ unpaired completions


def kto_loss(
    ratio: PerRow, desirable: Bool[Array, " B"], reference_point: PerRow | Scalar = 0.0, beta: Scalar = 0.1
) -> PerRow:
    """1 - σ(β(Δ - z)) where desirable, else 1 - σ(β(z - Δ)) (KTO, arXiv:2402.01306, eq. 8, λ = 1).

    z, the reference point, is a constant. With z = 0 this is APO-zero for unpaired completions.
    """
    x = beta * (ratio - stop_gradient(reference_point))
    return logistic(jnp.where(desirable, -x, x))


def bco_loss(ratio: PerRow, desirable: Bool[Array, " B"], shift: PerRow | Scalar = 0.0, beta: Scalar = 0.1) -> PerRow:
    """-log σ(β Δ - δ) where desirable, else -log σ(δ - β Δ) (BCO, arXiv:2404.04656). The shift δ is a constant."""
    x = beta * ratio - stop_gradient(shift)
    return -log_sigmoid(jnp.where(desirable, x, -x))


# -------------------------------------------------------------------------------------------------------- no reference


def simpo_loss(
    chosen: PerRow, rejected: PerRow, beta: Scalar = 2.0, gamma: Scalar = 1.0, label_smoothing: Scalar = 0.0
) -> PerRow:
    """-log σ(β(ℓ̄_w - ℓ̄_l) - γ) of mean log-probs ℓ̄ (SimPO, arXiv:2405.14734, eq. 6)."""
    return label_smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def alphapo_reward(mean_logp: PerRow, alpha: float = 0.25) -> PerRow:
    """(1 - e^{-α ℓ̄})/α, which replaces ℓ̄ in SimPO (AlphaPO, arXiv:2501.03884); ℓ̄ itself at α = 0."""
    return mean_logp if alpha == 0 else -_expm1(-alpha * mean_logp) / alpha


def log_odds(mean_logp: PerRow) -> PerRow:
    """log p/(1 - p) of p = e^{ℓ̄}, for ℓ̄ at most -1e-7 (no gradient above), as the odds of p = 1 are infinite."""
    x = jnp.minimum(mean_logp, -1e-7)
    near = x > -0.6931471805599453  # each branch is accurate on its side; the other must not reach log 0
    away = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return x - jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), away)


def odds_ratio(chosen: PerRow, rejected: PerRow) -> PerRow:
    """-log σ(log odds_w - log odds_l) of mean log-probs (ORPO, arXiv:2403.07691, eq. 7)."""
    return -log_sigmoid(log_odds(chosen) - log_odds(rejected))


# ----------------------------------------------------------------------------- f-DPO: f'(π/π_ref) replaces log π/π_ref


def reverse_kl(ratio: PerRow) -> PerRow:
    """Δ: DPO's own."""
    return ratio


def forward_kl(ratio: PerRow) -> PerRow:
    """f'(u) = 1 - 1/u: 1 - e^{-Δ} (f-DPO, arXiv:2309.16240, table 1)."""
    return -_expm1(-ratio)


def jensen_shannon(ratio: PerRow) -> PerRow:
    """f'(u) = log(2u/(1 + u)): log 2 + log σ(Δ) (f-DPO)."""
    return jnp.log(2.0) + log_sigmoid(ratio)


def alpha_divergence(ratio: PerRow, alpha: float = 0.5) -> PerRow:
    """f'(u) = (1 - u^{-α})/α (f-DPO, arXiv:2309.16240): `reverse_kl` in the limit α = 0 and `forward_kl` at 1."""
    return ratio if alpha == 0 else -_expm1(-alpha * ratio) / alpha


# -------------------------------------------------------------------------------------- weights of tokens and of pairs


def shared_length_weights(mask: TokenMask, other: Bool[Array, "B T2"], alpha: Scalar) -> PerToken:
    """1 on the first min(n, n') tokens of a completion, α on the tokens beyond (LD-DPO, arXiv:2409.06411)."""
    shared = jnp.minimum(mask.sum(axis=1), other.sum(axis=1))
    within = jnp.cumsum(mask, axis=1) <= shared[:, None]
    return jnp.where(mask, jnp.where(within, 1.0, alpha), 0.0)


def alignment(logp: PerToken, sum_pi_squared: PerToken, mask: TokenMask) -> PerRow:
    """mean_t [log π(a_t) - log Σ_v π(v)²]: likelihood of a completion relative to the policy's own samples."""
    collision = jnp.log(jnp.where(mask, sum_pi_squared, 1.0))
    terms = jnp.where(mask, logp, 0.0) - collision
    return terms.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def wpo_weight(chosen: PerRow, rejected: PerRow) -> PerRow:
    """w_w w_l, w = exp(alignment), constant: off-policy pairs weigh less (WPO, arXiv:2406.11827).

    The equation has no upper bound, so there is none here: a pair of completions more likely than the policy's own
    samples weighs more than 1. The authors' code (`run_wpo.py`) clamps the product at 1, as TRL's `use_weighting` did
    before 0.29.
    """
    return stop_gradient(_exp(chosen + rejected))


# --------------------------------------------------------------------------------------------- optimal transport (AOT)


def match_by_rank(x: PerRow, y: PerRow, valid: Bool[Array, " B"]) -> PerRow:
    """For each valid x the valid y of the same rank; 0 where not valid.

    Sorting both and comparing term by term is the optimal transport between two samples of numbers. Matched by rank,
    every row keeps its own term, and the gradient is that of the sorted difference.
    """
    rank = jnp.argsort(jnp.argsort(jnp.where(valid, x, jnp.inf)))
    return jnp.where(valid, jnp.sort(jnp.where(valid, y, jnp.inf))[rank], 0.0)


def aot_loss(margin: PerRow, matched_ref_margin: PerRow, beta: Scalar = 0.1, label_smoothing: Scalar = 0.0) -> PerRow:
    """Smoothed -log σ(β(m - m_ref)) of the policy's margin log π(y_w)/π(y_l) and the reference's margin of equal rank
    (AOT, arXiv:2406.05882)."""
    return label_smoothed(beta * (margin - stop_gradient(matched_ref_margin)), label_smoothing)


def aot_unpaired_loss(
    chosen: PerRow,
    rejected: PerRow,
    matched_rejected: PerRow,
    matched_chosen: PerRow,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> PerRow:
    """Smoothed -log σ(β(Δ_w - Δ_l)) of chosen and rejected completions of equal rank (AOT, unpaired).

    Row i holds a chosen completion, matched with another row's rejected one, and a rejected completion, matched with
    another row's chosen one. Each term has a gradient for its own completion only; over the batch the two sum to the
    same value, so half of the value is taken and the whole gradient.
    """
    up = label_smoothed(beta * (chosen - stop_gradient(matched_rejected)), label_smoothing)
    down = label_smoothed(beta * (stop_gradient(matched_chosen) - rejected), label_smoothing)
    both = up + down
    return both - stop_gradient(0.5 * both)
