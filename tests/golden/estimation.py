"""Estimators, returns, reductions and diagnostics against the peers."""

import jax.numpy as jnp

from rljax.ops import kl
from tests.golden.entry import Case, Entry, gradient


def kl_penalty(case: Case) -> dict:
    estimator = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[case.name]
    return dict(
        zip(
            ("grad_sum_logprob", "kl"),
            (
                gradient(lambda x: estimator(x["logprob"], x["ref_logprob"]).sum(), case.ins, "logprob")[1],
                estimator(case.ins["logprob"], case.ins["ref_logprob"]),
            ),
            strict=True,
        )
    )


TABLE = {
    "verl_new_kl_penalty": Entry("ops.kl", kl_penalty, not_run={"k1+": "", "k3+": "", "low_var_kl+": ""}),
}
