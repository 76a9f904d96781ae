"""Agreement of annotators: N items, A annotators, each label one of C categories; no label is missing."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Labels = Int[Array, "N A"]


def raw_agreement(labels: Labels, categories: int) -> Float[Array, ""]:
    """The share of equal labels among all pairs of annotators, over all items. Wants two annotators at least."""
    counts = category_counts(labels, categories)
    A = labels.shape[1]
    return (counts * (counts - 1)).sum(axis=1).mean() / (A * (A - 1))


def cohen_kappa(labels: Int[Array, "N 2"], categories: int) -> Float[Array, ""]:
    """κ = (p_o - p_e)/(1 - p_e) of two annotators: p_o is the share of equal labels, p_e = Σ_c p_1(c) p_2(c) what two
    annotators with these frequencies would agree on by chance (Cohen 1960). NaN where both use one category only.
    """
    one_hot = labels[:, :, None] == jnp.arange(categories)[None, None]
    frequencies = one_hot.mean(axis=0)
    expected = (frequencies[0] * frequencies[1]).sum()
    return _beyond_chance(raw_agreement(labels, categories), expected)


def fleiss_kappa(labels: Labels, categories: int) -> Float[Array, ""]:
    """κ = (P - P_e)/(1 - P_e) of several annotators: P is `raw_agreement`, P_e = Σ_c p(c)² with the frequency p(c) of a
    category over all labels (Fleiss 1971). NaN where there is one category only.
    """
    frequencies = category_counts(labels, categories).mean(axis=0) / labels.shape[1]
    return _beyond_chance(raw_agreement(labels, categories), (frequencies**2).sum())


def category_counts(labels: Labels, categories: int) -> Float[Array, "N C"]:
    """How many annotators gave each label to each item."""
    return (labels[:, :, None] == jnp.arange(categories)[None, None]).sum(axis=1).astype(float)


def _beyond_chance(observed: Float[Array, ""], expected: Float[Array, ""]) -> Float[Array, ""]:
    one_category = expected >= 1.0
    return jnp.where(one_category, jnp.nan, (observed - expected) / jnp.where(one_category, 1.0, 1.0 - expected))
