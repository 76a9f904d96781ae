"""Estimators by exact enumeration: every draw of N samples from a small distribution, with its probability."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import estimation

draw = np.random.default_rng(0)
P, Q = draw.dirichlet(np.ones(4), size=2)
F, G = draw.normal(size=(2, 4))
G += F  # correlated with F
WEIGHTS = P / Q
N = 3
DRAWS = np.array(list(product(range(4), repeat=N)))  # all 64 of them


def f32(x):
    return jnp.asarray(x, jnp.float32)


def chance(p):
    return p[DRAWS].prod(axis=1)


def mean_and_variance(estimates, p):
    estimates = np.float64(estimates)
    mean = (chance(p) * estimates).sum()
    return mean, (chance(p) * (estimates - mean) ** 2).sum()


def moments(f, p):
    mean = (p * f).sum()
    return mean, (p * (f - mean) ** 2).sum()


def test_monte_carlo_is_unbiased_and_its_error_too():
    got = estimation.monte_carlo(f32(F[DRAWS]))
    mean, variance = moments(F, P)
    np.testing.assert_allclose(mean_and_variance(got.mean, P), (mean, variance / N), rtol=1e-5)
    np.testing.assert_allclose((chance(P) * np.float64(got.error) ** 2).sum(), variance / N, rtol=1e-5)


def test_a_given_control_variate_keeps_the_mean_and_takes_its_share_of_the_variance():
    (f_mean, f_variance), (g_mean, g_variance) = moments(F, P), moments(G, P)
    covariance = (P * (F - f_mean) * (G - g_mean)).sum()
    best = covariance / g_variance
    for c in (best, 0.3, -1.0):
        samples = estimation.control_variate(f32(F[DRAWS]), f32(G[DRAWS]), g_mean, c)
        mean, variance = mean_and_variance(estimation.monte_carlo(samples).mean, P)
        np.testing.assert_allclose(mean, f_mean, rtol=1e-5)
        np.testing.assert_allclose(variance, (f_variance - 2 * c * covariance + c * c * g_variance) / N, rtol=1e-5)
    correlation = covariance / np.sqrt(f_variance * g_variance)
    samples = estimation.control_variate(f32(F[DRAWS]), f32(G[DRAWS]), g_mean, best)
    variance = mean_and_variance(estimation.monte_carlo(samples).mean, P)[1]
    np.testing.assert_allclose(variance, f_variance * (1 - correlation**2) / N, rtol=1e-5)


def test_the_estimated_coefficient_is_the_least_squares_slope():
    x, g = draw.normal(size=(2, 2, 9))
    want = [np.polyfit(g[row], x[row], 1)[0] for row in range(2)]
    np.testing.assert_allclose(estimation.control_coefficient(f32(x), f32(g)), want, rtol=1e-5)
    np.testing.assert_array_equal(estimation.control_coefficient(f32(x), jnp.ones((2, 9))), 0.0)
    exact = estimation.control_variate(f32(2 * g + 1), f32(g), 0.25)  # a linear function of the control
    np.testing.assert_allclose(exact, 1.5, rtol=1e-5)


def test_antithetic_pairs_have_half_the_variance_times_one_plus_the_correlation():
    steps = (np.arange(10) + 0.5) / 10  # uniform u; mirrored 1 - u
    f = np.exp(steps)
    pairs = np.float64(estimation.antithetic(f32(f), f32(f[::-1].copy())))
    correlation = np.corrcoef(f, f[::-1])[0, 1]
    np.testing.assert_allclose(pairs.mean(), f.mean(), rtol=1e-6)
    np.testing.assert_allclose(pairs.var(), 0.5 * f.var() * (1 + correlation), rtol=1e-4)
    np.testing.assert_allclose(estimation.antithetic(f32(steps), f32(1 - steps)), 0.5, rtol=1e-6)  # exact if linear


def test_the_optimal_baseline_keeps_the_mean_of_the_gradient_and_has_the_least_variance():
    score = np.eye(4) - P  # ∇ log p(a) by the logits
    squared = (score**2).sum(axis=1)
    many = np.repeat(np.arange(4), np.round(P * 20_000).astype(int))  # samples in the proportions of P
    best = float(estimation.optimal_baseline(f32(squared[many]), f32(F[many])))
    np.testing.assert_allclose(best, (P * squared * F).sum() / (P * squared).sum(), rtol=1e-3)

    def spread(b):
        gradient = score * (F - b)[:, None]
        mean = P @ gradient
        np.testing.assert_allclose(mean, P @ (score * F[:, None]), atol=1e-12)
        return (P * (gradient**2).sum(axis=1)).sum() - (mean**2).sum()

    assert spread(best) < min(spread(best + 0.05), spread(best - 0.05), spread(0.0), spread((P * F).sum()))
    assert estimation.optimal_baseline(jnp.zeros(3), jnp.ones(3)) == 0


def test_importance_sampling_is_unbiased_with_the_variance_of_the_weighted_samples():
    got = estimation.importance_sampling(f32(F[DRAWS]), f32(WEIGHTS[DRAWS]))
    mean, variance = mean_and_variance(got.mean, Q)
    np.testing.assert_allclose(mean, (P * F).sum(), rtol=1e-5)
    np.testing.assert_allclose(variance, moments(WEIGHTS * F, Q)[1] / N, rtol=1e-5)


def test_self_normalised_weights_need_no_constant_stay_in_range_and_are_nearly_unbiased():
    got = estimation.self_normalized(f32(F[DRAWS]), f32(7.0 * WEIGHTS[DRAWS]))
    plain = estimation.self_normalized(f32(F[DRAWS]), f32(WEIGHTS[DRAWS]))
    np.testing.assert_allclose(got.mean, plain.mean, rtol=1e-5)
    np.testing.assert_allclose(got.error, plain.error, rtol=1e-4, atol=1e-6)
    assert (got.mean <= F[DRAWS].max(axis=1) + 1e-5).all()
    assert (got.mean >= F[DRAWS].min(axis=1) - 1e-5).all()
    many = np.repeat(np.arange(4), np.round(Q * 20_000).astype(int))
    limit = estimation.self_normalized(f32(F[many]), f32(WEIGHTS[many]))
    np.testing.assert_allclose(limit.mean, (P * F).sum(), rtol=1e-3)
    asymptotic = (Q * WEIGHTS**2 * (F - (P * F).sum()) ** 2).sum()
    np.testing.assert_allclose(limit.error, np.sqrt(asymptotic / len(many)), rtol=1e-3)
    constant = estimation.self_normalized(jnp.full(N, 2.5), f32(WEIGHTS[:N]))
    np.testing.assert_allclose(constant.mean, 2.5, rtol=1e-6)
    assert estimation.self_normalized(jnp.ones(3), jnp.zeros(3)).mean == 0


@pytest.mark.parametrize("bound", [0.5, 1.5, 100.0])
def test_truncated_weights_are_biased_by_what_was_cut(bound):
    got = estimation.truncated_importance_sampling(f32(F[DRAWS]), f32(WEIGHTS[DRAWS]), bound)
    mean, _ = mean_and_variance(got.mean, Q)
    np.testing.assert_allclose(mean, (np.minimum(P, bound * Q) * F).sum(), rtol=1e-4, atol=1e-6)


def test_weights_of_trajectories_and_of_decisions_give_the_return_under_the_other_policy():
    """Three binary decisions whose chances depend on what came before: all eight episodes."""
    paths = np.array(list(product(range(2), repeat=3)))
    pi, mu = draw.dirichlet(np.ones(2), size=(2, 7))
    node = np.array([[2**t - 1 + int("0" + "".join(map(str, path[:t])), 2) for t in range(3)] for path in paths])
    earned = draw.normal(size=(7, 2))[node, paths]
    target, behaviour = pi[node, paths], mu[node, paths]
    gamma = 0.9
    whole = (earned * gamma ** np.arange(3)).sum(axis=1)
    want = (target.prod(axis=1) * whole).sum()
    ratios, all_of_it = f32(target / behaviour), jnp.ones((8, 3), bool)
    chance = behaviour.prod(axis=1)
    by_path = np.float64(estimation.trajectory_weights(ratios, all_of_it)) * whole
    by_decision = np.float64(estimation.per_decision(f32(earned), ratios, all_of_it, gamma))
    np.testing.assert_allclose((chance * by_path).sum(), want, rtol=1e-5)
    np.testing.assert_allclose((chance * by_decision).sum(), want, rtol=1e-5)
    last = np.zeros_like(earned)
    last[:, -1] = earned[:, -1]  # a reward at the end alone: the two are one
    got = estimation.per_decision(f32(last), ratios, all_of_it)
    np.testing.assert_allclose(got, target.prod(axis=1) / chance * last[:, -1], rtol=1e-4)


def test_effective_sample_size_counts_equal_weights_and_one_heavy_one():
    size, share = estimation.effective_sample_size, estimation.ess_fraction
    np.testing.assert_allclose(size(jnp.full(7, 0.3)), 7.0, rtol=1e-6)
    np.testing.assert_allclose(size(f32([0, 5.0, 0, 0])), 1.0)
    np.testing.assert_allclose(size(f32([1, 1, 0, 0])), 2.0)
    np.testing.assert_allclose(share(f32([[1, 1, 0, 0], [3, 3, 3, 3]])), [0.5, 1.0])
    np.testing.assert_allclose(share(f32(WEIGHTS)), 1 / np.mean((WEIGHTS / WEIGHTS.mean()) ** 2), rtol=1e-5)
    assert size(jnp.zeros(3)) == share(jnp.zeros(3)) == 0


MASKED = {
    "monte carlo": lambda x, w, m: estimation.monte_carlo(x, m),
    "control coefficient": lambda x, w, m: estimation.control_coefficient(x, w, m),
    "control variate": lambda x, w, m: estimation.monte_carlo(estimation.control_variate(x, w, 0.5, mask=m), m),
    "baseline": lambda x, w, m: estimation.optimal_baseline(w, x, m),
    "importance sampling": lambda x, w, m: estimation.importance_sampling(x, w, m),
    "self-normalised": lambda x, w, m: estimation.self_normalized(x, w, m),
    "truncated": lambda x, w, m: estimation.truncated_importance_sampling(x, w, 1.2, m),
    "trajectory weights": lambda x, w, m: estimation.trajectory_weights(w, m),
    "per decision": lambda x, w, m: estimation.per_decision(x, w, m, 0.9),
    "effective size": lambda x, w, m: estimation.effective_sample_size(w, m),
    "effective share": lambda x, w, m: estimation.ess_fraction(w, m),
}


@pytest.mark.parametrize("garbage", [np.nan, 1e30])
@pytest.mark.parametrize("name", MASKED)
def test_masked_samples_are_as_if_they_were_not_there(name, garbage):
    kept = np.array([True, False, True, True, False, True, True])
    x, w = draw.normal(size=(2, 7)), draw.uniform(0.5, 2, size=(2, 7))
    dirty = [f32(np.where(kept, y, garbage)) for y in (x, w)]
    mask = jnp.broadcast_to(kept, (2, 7))

    def total(x, w, mask):
        out = MASKED[name](x, w, mask)
        return jax.tree.reduce(lambda sum_, y: sum_ + y.sum(), out, 0.0), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, got), slopes = run(*dirty, mask)
    (_, want), fewer = run(*(f32(y[:, kept]) for y in (x, w)), jnp.ones((2, 5), bool))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(slopes, fewer, strict=True):
        np.testing.assert_allclose(a[:, kept], b, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(a[:, ~kept], 0.0)
    assert all(
        (np.asarray(y) == (1.0 if "trajectory" in name else 0.0)).all()
        for y in jax.tree.leaves(MASKED[name](*dirty, mask & False))
    )


@pytest.mark.parametrize("name", MASKED)
def test_the_width_of_numbers_is_that_of_the_input(name):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            x = jnp.asarray(draw.normal(size=5), dtype)
            out = MASKED[name](x, jnp.exp(x), jnp.ones(5, bool))
            assert {y.dtype for y in jax.tree.leaves(out)} == {jnp.dtype(dtype)}
