"""Recorded outputs of the peers' own code: golden/NAME.npz in the shared folder; the README there explains them."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Case(NamedTuple):
    hyper: dict
    ins: dict  # name -> float32 or integer array, as rljax takes it
    outs: dict  # name -> what the peer returned


def golden(shared: Path, name: str) -> dict[str, Case]:
    """Every recorded case of one peer's function, by name."""
    path = shared / "golden" / f"{name}.npz"
    if not path.is_file():
        pytest.skip("the shared folder has no golden vectors (RLJAX_SHARED)")
    with np.load(path) as file:
        cases = json.loads(str(file["__meta__"]))["cases"]

        def read(case, side, names):
            return {n: file[f"{case}/{side}/{n}"] for n in names}

        return {
            case: Case(
                about["hyper"],
                {n: narrow(x) for n, x in read(case, "in", about["inputs"]).items()},
                read(case, "out", about["outputs"]),
            )
            for case, about in cases.items()
        }


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
