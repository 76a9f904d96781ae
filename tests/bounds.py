"""How far two programs of the same mathematics may be apart: by the size of their sums and the dtype.

Which order XLA adds in hangs on the processor, the shapes and its version. A sum of n terms is off by at most
n·u·Σ|terms| in any order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), u = eps/2, so that two
orders are at most n·eps·Σ|terms| apart. In a long sum errors of either sign cancel: it is off by at most
λ·√n·u·Σ|terms| but for a probability of 2 exp(-λ²/2), 3e-14 at λ = 8
(Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019).
"""

import jax.numpy as jnp
import numpy as np

EPS = float(jnp.finfo(jnp.float32).eps)
LAMBDA = 8.0


def of_sum(terms: int, size: float = 1.0) -> float:
    """Between two orders of adding up so many float32 terms, whose absolute values add up to `size`."""
    return terms * EPS * size


def of_long_sum(terms: int, size: float = 1.0) -> float:
    """As `of_sum`, of errors that cancel."""
    return min(terms, LAMBDA * terms**0.5) * EPS * size


def of_decoder(config, columns: int, size: float) -> float:
    """Between two programs' logits of that size, or log-probs, of rows of so many columns.

    Counted are all terms that an activation is a sum of. In each layer: two norms, the projections into attention and
    into the MLP (`hidden_size` terms each), scores (`head_dim`), softmax and mix (a column each), and the projections
    out; then the last norm and the logits.
    """
    return of_long_sum(_terms(config, columns), max(1.0, float(size)))


def of_logp(config, traj) -> float:
    """Between two programs' log-probs of the chosen tokens."""
    return of_decoder(config, traj.mask.shape[1], np.abs(np.where(traj.mask, traj.logp, 0.0)).max())


def of_gradient(config, columns: int, tokens: int, size: float) -> float:
    """Between two programs' gradients of that size: the terms forward, twice as many backward, a sum over tokens."""
    return of_long_sum(3 * _terms(config, columns) + tokens, float(size))


def _terms(config, columns: int) -> int:
    inner = config.intermediate_size
    if config.moe is not None:
        inner = (
            max(inner, config.moe.intermediate_size + config.moe.num_experts_per_tok) + config.hidden_size
        )  # the router
    attention = 2 * config.hidden_size + config.head_dim + 2 * columns + config.num_heads * config.head_dim
    return config.num_layers * (attention + 2 * config.hidden_size + inner) + 2 * config.hidden_size
