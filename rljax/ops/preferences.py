"""Losses of one comparison, to be minimised, unreduced: the DPO family.

`chosen` and `rejected` are Δ_w and Δ_l: log π/π_ref of the better and of the worse answer, summed over their tokens.
β Δ is the implicit reward, D = Δ_w - Δ_l. One function serves several papers by what it is given: means over the tokens
(length-normalised DPO, arXiv:2411.15124; IPO as its authors run it), log π itself (reference-free; CPO), f'(π/π_ref)
(f-DPO). A hyperparameter is bound by `functools.partial`.

Left out: soft preference probabilities from a judge (SPPO's own), n-way EXO and NCA. Exponents are clamped at 80, which
float32 can hold, with no gradient beyond.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
from jax.nn import sigmoid as logistic
from jaxtyping import Array, Bool, Float

Ratios = Float[Array, " B"]
Scalar = float | Float[Array, ""]
Terms = Float[Array, "B T"]
Mask = Bool[Array, "B T"]


def _exp(x):
    return jnp.exp(jnp.minimum(x, 80.0))


def _expm1(x):
    return jnp.expm1(jnp.minimum(x, 80.0))


# ------------------------------------------------------------------------------------------------ of the difference D


def label_smoothed(x: Ratios, label_smoothing: Scalar = 0.0) -> Ratios:
    """-(1 - ε) log σ(x) - ε log σ(-x): logistic loss where a share ε of the labels is wrong (cDPO, Mitchell 2023)."""
    return -(1.0 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def sigmoid(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1, label_smoothing: Scalar = 0.0) -> Ratios:
    """-log σ(β D) (DPO, arXiv:2305.18290, eq. 7); cDPO with `label_smoothing`."""
    return label_smoothed(beta * (chosen - rejected), label_smoothing)


def robust(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1, label_smoothing: Scalar = 0.1) -> Ratios:
    """[-(1 - ε) log σ(β D) + ε log σ(-β D)]/(1 - 2ε), ε < ½: unbiased under flipped labels, unbounded below
    (arXiv:2403.00409)."""
    x = beta * (chosen - rejected)
    clean, flipped = (1.0 - label_smoothing) * log_sigmoid(x), label_smoothing * log_sigmoid(-x)
    return (flipped - clean) / (1.0 - 2.0 * label_smoothing)


def hinge(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1) -> Ratios:
    """max(0, 1 - β D) (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


def ipo(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1) -> Ratios:
    """(D - 1/(2β))² (IPO, arXiv:2310.12036, eq. 17, β = τ). The authors' runs give it means over the tokens."""
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def exo_pair(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1, label_smoothing: float = 1e-3) -> Ratios:
    """KL of (σ(β D), σ(-β D)) from (1 - ε, ε) (EXO, arXiv:2402.00856, eq. 16).

    Raises ValueError for ε = 0, where the loss is infinite.
    """
    if label_smoothing == 0:
        raise ValueError("exo_pair needs label_smoothing > 0: its target is (1 - ε, ε), and the paper takes ε = 1e-3")
    x = beta * (chosen - rejected)
    better = logistic(x) * (log_sigmoid(x) - jnp.log1p(-label_smoothing))
    return better + logistic(-x) * (log_sigmoid(-x) - jnp.log(label_smoothing))


def discopop(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1, tau: Scalar = 0.05) -> Ratios:
    """(1 - q)(-log σ(β D)) + q e^{-β D}, q = σ(β D/τ) (arXiv:2406.08414, eq. 5)."""
    x = beta * (chosen - rejected)
    return -logistic(-x / tau) * log_sigmoid(x) + _exp(log_sigmoid(x / tau) - x)  # q e⁻ˣ as one exponential


# ------------------------------------------------------------------------------------------- of each answer's own ratio


def nca_pair(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.01) -> Ratios:
    """-log σ(β Δ_w) - ½ log σ(-β Δ_w) - ½ log σ(-β Δ_l) (NCA, arXiv:2402.05369)."""
    x, y = beta * chosen, beta * rejected
    return -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y)


def bco_pair(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1) -> Ratios:
    """-log σ(β Δ_w) - log σ(-β Δ_l) (arXiv:2404.04656, without the shift δ)."""
    return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)


def sppo_hard(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1) -> Ratios:
    """(Δ_w - 1/(2β))² + (Δ_l + 1/(2β))² (SPPO, arXiv:2405.00675, eq. 4.7 with probabilities 1 and 0)."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1) -> Ratios:
    """1 - σ(β Δ_w) + σ(β Δ_l): for chosen answers better than the model's (APO, arXiv:2408.06266, eq. 7)."""
    return logistic(-beta * chosen) + logistic(beta * rejected)


def apo_down(chosen: Ratios, rejected: Ratios, beta: Scalar = 0.1) -> Ratios:
    """σ(β Δ_w) + 1 - σ(β D): for chosen answers worse than the model's (APO, arXiv:2408.06266, eq. 8)."""
    return logistic(beta * chosen) + logistic(-beta * (chosen - rejected))


def mixture(*parts):
    """Σ w_k L_k for parts (w_k, L_k): losses of the same arguments."""

    def loss(*args):
        return sum(weight * part(*args) for weight, part in parts)

    return loss


# --------------------------------------------------------------------------------------------------- one answer, judged


def kto_loss(
    ratio: Ratios, desirable: Bool[Array, " B"], reference_point: Ratios | Scalar = 0.0, beta: Scalar = 0.1
) -> Ratios:
    """1 - σ(β(Δ - z)) where desirable, else 1 - σ(β(z - Δ)) (KTO, arXiv:2402.01306, eq. 8, λ = 1).

    z, the reference point, is a constant. With z = 0 this is APO-zero of unpaired answers.
    """
    x = beta * (ratio - stop_gradient(reference_point))
    return logistic(jnp.where(desirable, -x, x))


def bco_loss(ratio: Ratios, desirable: Bool[Array, " B"], shift: Ratios | Scalar = 0.0, beta: Scalar = 0.1) -> Ratios:
    """-log σ(β Δ - δ) where desirable, else -log σ(δ - β Δ) (BCO, arXiv:2404.04656). The shift δ is a constant."""
    x = beta * ratio - stop_gradient(shift)
    return -log_sigmoid(jnp.where(desirable, x, -x))


# ------------------------------------------------------------------------------------------------------- no reference


def simpo_loss(
    chosen: Ratios, rejected: Ratios, beta: Scalar = 2.0, gamma: Scalar = 1.0, label_smoothing: Scalar = 0.0
) -> Ratios:
    """-log σ(β(ℓ̄_w - ℓ̄_l) - γ) of mean log-probs ℓ̄ (SimPO, arXiv:2405.14734, eq. 6)."""
    return label_smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def alphapo_reward(mean_logp: Ratios, alpha: float = 0.25) -> Ratios:
    """(1 - e^{-α ℓ̄})/α, which stands for ℓ̄ in SimPO (AlphaPO, arXiv:2501.03884); ℓ̄ itself at α = 0."""
    return mean_logp if alpha == 0 else -_expm1(-alpha * mean_logp) / alpha


def log_odds(mean_logp: Ratios) -> Ratios:
    """log p/(1 - p) of p = e^{ℓ̄}, for ℓ̄ at most -1e-7 (no gradient above): a certain answer has no odds."""
    x = jnp.minimum(mean_logp, -1e-7)
    near = x > -0.6931471805599453  # each branch is exact on its side; the other must not reach log 0
    away = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return x - jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), away)


def odds_ratio(chosen: Ratios, rejected: Ratios) -> Ratios:
    """-log σ(log odds_w - log odds_l) of mean log-probs (ORPO, arXiv:2403.07691, eq. 7)."""
    return -log_sigmoid(log_odds(chosen) - log_odds(rejected))


# ---------------------------------------------------------------------------- f-DPO: f'(π/π_ref) stands for log π/π_ref


def reverse_kl(ratio: Ratios) -> Ratios:
    """Δ: DPO's own."""
    return ratio


def forward_kl(ratio: Ratios) -> Ratios:
    """f'(u) = 1 - 1/u: 1 - e^{-Δ} (f-DPO, arXiv:2309.16240, table 1)."""
    return -_expm1(-ratio)


def jensen_shannon(ratio: Ratios) -> Ratios:
    """f'(u) = log(2u/(1 + u)): log 2 + log σ(Δ) (f-DPO)."""
    return jnp.log(2.0) + log_sigmoid(ratio)


def alpha_divergence(ratio: Ratios, alpha: float = 0.5) -> Ratios:
    """f'(u) = (u^{α-1} - 1)/(α - 1), whose limits are `reverse_kl` at α = 1 and `forward_kl` at 0."""
    return ratio if alpha == 1 else _expm1((alpha - 1.0) * ratio) / (alpha - 1.0)


# ------------------------------------------------------------------------------------- weights of tokens and of pairs


def shared_length_weights(mask: Mask, other: Bool[Array, "B T2"], alpha: Scalar) -> Terms:
    """1 on the first min(n, n') tokens of an answer, α on those by which it is longer (LD-DPO, arXiv:2409.06411)."""
    shared = jnp.minimum(mask.sum(axis=1), other.sum(axis=1))
    within = jnp.cumsum(mask, axis=1) <= shared[:, None]
    return jnp.where(mask, jnp.where(within, 1.0, alpha), 0.0)


def alignment(logp: Terms, sum_pi_squared: Terms, mask: Mask) -> Ratios:
    """mean_t [log π(a_t) - log Σ_v π(v)²]: how likely the policy would write an answer, against one of its own."""
    collision = jnp.log(jnp.where(mask, sum_pi_squared, 1.0))
    terms = jnp.where(mask, logp, 0.0) - collision
    return terms.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def wpo_weight(chosen: Ratios, rejected: Ratios) -> Ratios:
    """w_w w_l, w = exp(alignment), constant: off-policy pairs count less (WPO, arXiv:2406.11827, eq. 2)."""
    return stop_gradient(_exp(chosen + rejected))


# ------------------------------------------------------------------------------------------- optimal transport (AOT)


def match_by_rank(x: Ratios, y: Ratios, valid: Bool[Array, " B"]) -> Ratios:
    """The y that has among the valid y the rank of each x among the valid x; 0 where not valid.

    Sorting both and comparing term by term is the transport of least cost between two samples of numbers. Matched by
    rank, every row keeps its own term: the gradient is that of the sorted difference.
    """
    rank = jnp.argsort(jnp.argsort(jnp.where(valid, x, jnp.inf)))
    return jnp.where(valid, jnp.sort(jnp.where(valid, y, jnp.inf))[rank], 0.0)


def aot_loss(margin: Ratios, matched_ref_margin: Ratios, beta: Scalar = 0.1, label_smoothing: Scalar = 0.0) -> Ratios:
    """Smoothed -log σ(β(m - m_ref)) of the policy's margin log π(y_w)/π(y_l) and the reference's margin of equal rank
    (AOT, arXiv:2406.05882)."""
    return label_smoothed(beta * (margin - stop_gradient(matched_ref_margin)), label_smoothing)


def aot_unpaired_loss(
    chosen: Ratios,
    rejected: Ratios,
    matched_rejected: Ratios,
    matched_chosen: Ratios,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> Ratios:
    """Smoothed -log σ(β(Δ_w - Δ_l)) of chosen and rejected answers of equal rank (AOT, unpaired).

    Row i holds a chosen answer, matched with another row's rejected one, and a rejected answer, matched with another
    row's chosen one. Each term moves its own answer only; over the batch the two sum to the same value, so half of the
    value is taken and the whole gradient.
    """
    up = label_smoothed(beta * (chosen - stop_gradient(matched_rejected)), label_smoothing)
    down = label_smoothed(beta * (stop_gradient(matched_chosen) - rejected), label_smoothing)
    both = up + down
    return both - stop_gradient(0.5 * both)
