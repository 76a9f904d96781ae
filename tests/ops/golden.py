"""Numbers as rljax takes them, and compared to float32 rounding."""

import jax
import jax.numpy as jnp
import numpy as np


def narrow(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else None)


def close(got, want, where=None, rtol=2e-5, atol=2e-6, case="") -> None:
    """Equal to float32 rounding, wherever `where` holds."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if where is not None:
        where = np.asarray(where, bool)
        assert where.any(), f"{case}: nothing compared"
        got, want = got[where], want[where]
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=str(case))
