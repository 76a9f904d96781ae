"""What the preference losses must obey, by closed forms. Peers' numbers: tests/golden/preferences.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import preferences
from tests.ops.lifted import Lifted, close, float64  # noqa: F401 (the fixture)

p = Lifted(preferences)
CHOSEN, REJECTED = np.random.default_rng(0).normal(scale=4.0, size=(2, 7))
OF_THE_DIFFERENCE = [
    p.sigmoid,
    partial(p.sigmoid, label_smoothing=0.2),
    p.robust,
    p.hinge,
    p.ipo,
    p.exo_pair,
    p.discopop,
]
PAIRED = [*OF_THE_DIFFERENCE, p.nca_pair, p.bco_pair, p.sppo_hard, p.apo_zero, p.apo_down, p.simpo_loss]


def slopes(loss, chosen, rejected, *args):
    return jax.grad(lambda c, r: loss(c, r, *args).sum(), argnums=(0, 1))(jnp.asarray(chosen), jnp.asarray(rejected))


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def test_dpo_pushes_by_the_weight_of_the_pairs_it_gets_wrong():
    """arXiv:2305.18290, section 4: ∂L/∂Δ_w = -β σ(-β D)."""
    better, worse = slopes(p.sigmoid, CHOSEN, REJECTED, 0.3)
    close(better, -0.3 * sigma(-0.3 * (CHOSEN - REJECTED)))
    close(worse, -better)


@pytest.mark.parametrize("loss", OF_THE_DIFFERENCE)
def test_a_loss_of_the_difference_moves_both_answers_alike(loss):
    better, worse = slopes(loss, CHOSEN, REJECTED, 0.5)
    assert np.abs(better).max() > 1e-3
    close(better, -worse)


@pytest.mark.parametrize("loss", PAIRED)
@pytest.mark.parametrize("width", [jnp.float32, jnp.float64])
def test_huge_ratios_give_finite_values_and_slopes(loss, width):
    far = jnp.asarray([1e4, -1e4, 1e4, -1e4, 0.0], width)
    other = jnp.asarray([-1e4, 1e4, 1e4, -1e4, 0.0], width)
    assert loss(far, other, 0.5).dtype == width
    for x in (loss(far, other, 0.5), *slopes(loss, far, other, 0.5)):
        assert np.isfinite(x).all()


def test_robust_is_the_clean_loss_on_average_over_flipped_labels():
    flips = 0.15
    straight, flipped = (p.robust(*x, 0.4, flips) for x in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)))
    close((1 - flips) * straight + flips * flipped, p.sigmoid(CHOSEN, REJECTED, 0.4))


def test_smoothing_wants_the_share_of_right_labels():
    at = np.log(0.9 / 0.1) / 0.4
    better, _ = slopes(partial(p.sigmoid, label_smoothing=0.1), [at - 1, at, at + 1], [0.0, 0.0, 0.0], 0.4)
    assert better[0] < 0 < better[2]
    close(better[1], 0.0)


def test_exo_is_a_divergence_of_two_probabilities():
    q = np.stack([sigma(0.5 * (CHOSEN - REJECTED)), sigma(0.5 * (REJECTED - CHOSEN))])
    want = (q * np.log(q / np.array([[0.9], [0.1]]))).sum(axis=0)
    close(p.exo_pair(CHOSEN, REJECTED, 0.5, 0.1), want)


def test_exo_refuses_certain_labels():
    with pytest.raises(ValueError, match="label_smoothing > 0"):
        p.exo_pair(CHOSEN, REJECTED, 0.5, 0.0)


@pytest.mark.parametrize(
    ("slope", "f"),
    [
        (p.reverse_kl, lambda u: u * jnp.log(u) - (u - 1)),
        (p.forward_kl, lambda u: -jnp.log(u) + u - 1),
        (p.jensen_shannon, lambda u: u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2)),
        (partial(p.alpha_divergence, alpha=0.3), lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * (0.3 - 1.0))),
    ],
)
def test_f_dpo_takes_the_slope_of_the_generator(slope, f):
    u = jnp.exp(jnp.asarray(CHOSEN))
    close(slope(jnp.log(u)), jax.vmap(jax.grad(f))(u))


def test_alpha_divergence_goes_over_into_both_kl():
    close(p.alpha_divergence(CHOSEN, 1e-7), p.reverse_kl(CHOSEN), rtol=1e-5)
    close(p.alpha_divergence(CHOSEN, 0.0), CHOSEN)
    close(p.alpha_divergence(CHOSEN, 1.0), p.forward_kl(CHOSEN))
    close(p.alpha_divergence(np.ones(1), 0.1), (1 - np.exp(-0.1)) / 0.1)


def test_alphapo_goes_over_into_simpo():
    logp = -np.abs(CHOSEN)
    close(p.alphapo_reward(logp, 1e-7), logp, rtol=1e-5)
    close(p.alphapo_reward(logp, 0.0), logp)
    close(p.alphapo_reward(logp, -1.0), np.exp(logp) - 1.0)


def test_log_odds_over_the_whole_range_and_finite_at_certainty():
    prob = np.array([1e-300, 1e-9, 0.1, 0.49999, 0.5, 0.50001, 0.9, 1 - 1e-6])
    close(p.log_odds(np.log(prob)), np.log(prob / (1 - prob)), rtol=1e-9)
    slope = jax.vmap(jax.grad(lambda x: p.log_odds(x[None])[0]))
    close(slope(np.log(prob)), 1 / (1 - prob), rtol=1e-9)
    for width in (np.float32, np.float64):
        assert np.isfinite(p.log_odds(jnp.zeros(1, width))).all()
        assert np.isfinite(slope(jnp.zeros(1, width))).all()


def test_judged_answers_are_the_halves_of_a_pair():
    good, bad = jnp.ones(7, bool), jnp.zeros(7, bool)
    close(p.kto_loss(CHOSEN, good, 0.0, 0.3) + p.kto_loss(REJECTED, bad, 0.0, 0.3), p.apo_zero(CHOSEN, REJECTED, 0.3))
    close(p.bco_loss(CHOSEN, good, 0.0, 0.3) + p.bco_loss(REJECTED, bad, 0.0, 0.3), p.bco_pair(CHOSEN, REJECTED, 0.3))


@pytest.mark.parametrize("loss", [p.kto_loss, p.bco_loss])
def test_the_reference_point_is_a_constant(loss):
    slope = jax.grad(lambda z: loss(jnp.asarray(CHOSEN), jnp.asarray(REJECTED) > 0, z).sum())
    assert slope(0.3) == 0
    assert not np.allclose(loss(CHOSEN, REJECTED > 0, 0.3), loss(CHOSEN, REJECTED > 0, 0.0))


def test_the_tail_of_the_longer_answer_weighs_less():
    mask = np.array([[0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    other = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    got = p.shared_length_weights(mask, other, 0.3)
    close(got, [[0, 1, 0, 1, 0.3, 0.3], [1, 1, 0, 0, 0, 0]])


def test_an_answer_as_likely_as_the_policys_own_weighs_one():
    """A uniform policy: log π = -log V = log Σ π²."""
    mask = np.array([[True, True, False], [False, False, False]])
    logp = np.where(mask, -np.log(5.0), np.nan)
    close(p.alignment(logp, np.where(mask, 0.2, np.nan), mask), [0.0, 0.0])
    surer = p.alignment(logp + np.log(2.0), np.where(mask, 0.2, np.nan), mask)
    close(p.wpo_weight(surer, surer), [4.0, 1.0])


@pytest.mark.parametrize("ties", [False, True])
def test_aot_has_the_gradient_of_the_sorted_difference(ties):
    x, y = (np.round(z) if ties else z for z in (CHOSEN, REJECTED))
    valid = np.ones(7, bool)
    f = partial(p.label_smoothed, label_smoothing=0.1)

    def by_sorting(x):
        return f(0.5 * (jnp.sort(x) - np.sort(y))).sum()

    def by_rank(x):
        return p.aot_loss(x, p.match_by_rank(x, y, valid), 0.5, 0.1).sum()

    for ours, want in zip(jax.value_and_grad(by_rank)(x), jax.value_and_grad(by_sorting)(x), strict=True):
        close(ours, want)


def test_unpaired_aot_has_the_gradient_of_the_sorted_difference_and_leaves_out_absent_rows():
    valid = np.array([1, 1, 0, 1, 1, 0, 1], bool)

    def by_sorting(x, y):
        return p.label_smoothed(0.5 * (jnp.sort(x[valid]) - jnp.sort(y[valid]))).sum()

    def by_rank(x, y):
        matched = p.match_by_rank(x, y, valid), p.match_by_rank(y, x, valid)
        return jnp.where(valid, p.aot_unpaired_loss(x, y, *matched, 0.5), 0.0).sum()

    ours, want = (jax.value_and_grad(g, argnums=(0, 1))(CHOSEN, REJECTED) for g in (by_rank, by_sorting))
    jax.tree.map(close, ours, want)


def test_a_mixture_is_the_weighted_sum():
    mixed = p.mixture((0.7, p.sigmoid), (0.2, p.hinge))
    close(mixed(CHOSEN, REJECTED, 0.3), 0.7 * p.sigmoid(CHOSEN, REJECTED, 0.3) + 0.2 * p.hinge(CHOSEN, REJECTED, 0.3))


def log_sigma(x):
    return -np.log1p(np.exp(-x))


BETA, W, L = 0.5, 0.7, -1.1  # D = 1.8, β D = 0.9
BY_HAND = {
    "sigmoid": -log_sigma(0.9),
    "robust": (-0.9 * log_sigma(0.9) + 0.1 * log_sigma(-0.9)) / 0.8,
    "hinge": 0.1,
    "ipo": (1.8 - 1.0) ** 2,
    "exo_pair": sigma(0.9) * np.log(sigma(0.9) / 0.999) + sigma(-0.9) * np.log(sigma(-0.9) / 0.001),
    "discopop": -sigma(-18.0) * log_sigma(0.9) + sigma(18.0) * np.exp(-0.9),
    "nca_pair": -log_sigma(0.35) - 0.5 * log_sigma(-0.35) - 0.5 * log_sigma(0.55),
    "bco_pair": -log_sigma(0.35) - log_sigma(0.55),
    "sppo_hard": (0.7 - 1.0) ** 2 + (-1.1 + 1.0) ** 2,
    "apo_zero": 1 - sigma(0.35) + sigma(-0.55),
    "apo_down": sigma(0.35) + 1 - sigma(0.9),
    "simpo_loss": -log_sigma(0.9 - 1.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_of_one_pair_by_hand(name):
    close(getattr(p, name)(np.array([W]), np.array([L]), BETA), [BY_HAND[name]])


def test_judged_and_reference_free_losses_by_hand():
    ratio, desirable = np.array([0.7, 0.7]), np.array([True, False])
    close(p.kto_loss(ratio, desirable, 0.3, 0.5), [1 - sigma(0.2), 1 - sigma(-0.2)])
    close(p.bco_loss(ratio, desirable, 0.3, 0.5), [-log_sigma(0.05), -log_sigma(-0.05)])
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (-0.2, -1.5)]
    close(p.odds_ratio(np.array([-0.2]), np.array([-1.5])), [-log_sigma(np.log(odds[0] / odds[1]))])
    close(p.sigmoid(np.array([W]), np.array([L]), BETA, 0.2), [-0.8 * log_sigma(0.9) - 0.2 * log_sigma(-0.9)])
    close(p.simpo_loss(np.array([W]), np.array([L]), BETA, 0.4), [-log_sigma(0.5)])
