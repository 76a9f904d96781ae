"""Returns and advantages against sums written out in numpy and against exact enumeration of a small tree."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import returns

discounted_returns, total_return, gae, td_errors, lambda_returns, vtrace_returns, corrected = (
    jax.jit(f)
    for f in (
        returns.discounted_returns,
        returns.total_return,
        returns.gae,
        returns.td_errors,
        returns.lambda_returns,
        returns.vtrace_returns,
        returns.importance_corrected_td_errors,
    )
)
n_step_returns = jax.jit(returns.n_step_returns, static_argnums=3)
B, T = 6, 9


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=atol)


def narrow(x):
    x = np.asarray(x)
    return jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else None)


def episodes(seed):
    """Random rewards, values, a mask with holes and an empty row, and ends of both kinds."""
    draw = np.random.default_rng(seed)
    rewards, values = draw.normal(size=(B, T)), draw.normal(size=(B, T + 1))
    mask = draw.random((B, T)) < 0.7
    mask[2] = False
    terminated = draw.random((B, T)) < 0.2
    truncated = (draw.random((B, T)) < 0.2) & ~terminated
    return rewards, values, mask, terminated, truncated, draw.normal(size=(B, T))


def decisions(mask):
    """(row, its own columns) of every row, and each decision with those that follow it."""
    for b in range(len(mask)):
        own = np.flatnonzero(mask[b])
        for i, t in enumerate(own):
            yield b, t, own[i:]


def advantage_by_sums(rewards, values, mask, terminated, truncated, final_values, gamma, lam):
    """Â_t = Σ_k (Π_{j<k} γ_j λ_j) δ_{t+k} over the row's own decisions, up to the end of its episode. float64."""
    gamma, lam = (np.broadcast_to(x, (B, T)) for x in (gamma, lam))
    out = np.zeros((B, T))
    for b, t, own in decisions(mask):
        weight = 1.0
        for s, after in zip(own, [*own[1:], T], strict=True):
            bootstrap = 0.0 if terminated[b, s] else final_values[b, s] if truncated[b, s] else values[b, after]
            out[b, t] += weight * (rewards[b, s] + gamma[b, s] * bootstrap - values[b, s])
            if terminated[b, s] or truncated[b, s]:
                break
            weight *= gamma[b, s] * lam[b, s]
    return out


def run_gae(rewards, values, mask, terminated, truncated, final_values, gamma, lam):
    facts = [narrow(x) for x in (rewards, values, mask, terminated, truncated, final_values)]
    return gae(*facts[:3], narrow(np.float64(gamma)), narrow(np.float64(lam)), *facts[3:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.97, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_gae_is_the_discounted_sum_of_td_errors_over_the_rows_own_decisions(seed, gamma, lam):
    facts = episodes(seed)
    close(run_gae(*facts, gamma, lam), advantage_by_sums(*facts, gamma, lam))


def test_gamma_and_lambda_may_differ_from_decision_to_decision():
    facts, draw = episodes(3), np.random.default_rng(0)
    gamma, lam = draw.uniform(0, 1, size=(2, B, T))
    close(run_gae(*facts, gamma, lam), advantage_by_sums(*facts, gamma, lam))
    close(run_gae(*facts, 0.9, lam), advantage_by_sums(*facts, 0.9, lam))


def test_truncated_decisions_need_the_value_they_bootstrap_from():
    facts = [narrow(x) for x in episodes(0)]
    with pytest.raises(ValueError, match="give final_values"):
        returns.gae(*facts[:3], truncated=facts[4])


def test_td_errors_are_those_of_one_step():
    rewards, values, mask, *_ = episodes(4)
    never = np.zeros((B, T), bool)
    want = advantage_by_sums(rewards, values, mask, never, never, rewards, 0.9, 0.0)
    close(td_errors(narrow(rewards), narrow(values), narrow(mask), 0.9), want)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_are_the_sums_of_what_the_row_still_earns(gamma):
    rewards, values, mask, *_ = episodes(0)
    want, whole, end = np.zeros((B, T)), np.zeros(B), values[:, -1]
    for b, t, own in decisions(mask):
        want[b, t] = sum(gamma**k * rewards[b, s] for k, s in enumerate(own))
        whole[b] = want[b, t] if t == np.flatnonzero(mask[b])[0] else whole[b]
    close(discounted_returns(narrow(rewards), narrow(mask), gamma), want)
    close(total_return(narrow(rewards), narrow(mask), gamma), whole)
    for b, t, own in decisions(mask):
        want[b, t] += gamma ** len(own) * end[b]
    close(discounted_returns(narrow(rewards), narrow(mask), gamma, narrow(end)), want)


def n_steps_by_sums(rewards, values, mask, n, gamma):
    out = np.zeros((B, T))
    for b, t, own in decisions(mask):
        steps = own[:n]
        after = own[n] if len(own) > n else T
        out[b, t] = sum(gamma**k * rewards[b, s] for k, s in enumerate(steps))
        out[b, t] += gamma ** len(steps) * values[b, after]
    return out


@pytest.mark.parametrize("n", [1, 2, 3, T + 4])
def test_n_step_returns_are_n_rewards_and_a_value(n):
    rewards, values, mask, *_ = episodes(5)
    got = n_step_returns(narrow(rewards), narrow(values), narrow(mask), n, 0.9)
    close(got, n_steps_by_sums(rewards, values, mask, n, 0.9))


def test_no_steps_are_refused():
    rewards, values, mask, *_ = (narrow(x) for x in episodes(0))
    with pytest.raises(ValueError, match="n >= 1"):
        returns.n_step_returns(rewards, values, mask, 0)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_the_lambda_return_is_the_mixture_of_n_step_returns(lam):
    """(1 - λ) Σ_{n<N} λ^(n-1) G^(n) + λ^(N-1) G^(N), N decisions to go."""
    rewards, values, mask, *_ = episodes(6)
    by_n = {n: n_steps_by_sums(rewards, values, mask, n, 0.9) for n in range(1, T + 1)}
    want = np.zeros((B, T))
    for b, t, own in decisions(mask):
        N = len(own)
        want[b, t] = lam ** (N - 1) * by_n[N][b, t]
        want[b, t] += sum((1 - lam) * lam ** (n - 1) * by_n[n][b, t] for n in range(1, N))
    close(lambda_returns(narrow(rewards), narrow(values), narrow(mask), 0.9, lam), want)


def vtrace_by_sums(rewards, values, ratios, mask, gamma, lam, rho_bar, c_bar):
    """v_s = V_s + Σ_t γ^(t-s) (Π_{s<=i<t} c_i) min(ρ̄, ρ_t) (r_t + γ V_{t+1} - V_t)."""
    out = np.zeros((B, T))
    for b, s, own in decisions(mask):
        out[b, s], trace = values[b, s], 1.0
        for k, (t, after) in enumerate(zip(own, [*own[1:], T], strict=True)):
            delta = min(rho_bar, ratios[b, t]) * (rewards[b, t] + gamma * values[b, after] - values[b, t])
            out[b, s] += gamma**k * trace * delta
            trace *= lam * min(c_bar, ratios[b, t])
    return out


@pytest.mark.parametrize(("lam", "rho_bar", "c_bar", "policy_rho_bar"), [(1, 1, 1, 1), (0.8, 1.5, 1.2, 1.1)])
def test_vtrace_is_the_sum_of_the_paper(lam, rho_bar, c_bar, policy_rho_bar):
    rewards, values, mask, *_ = episodes(7)
    ratios = np.random.default_rng(7).lognormal(size=(B, T))
    facts = [narrow(x) for x in (rewards, values, ratios, mask)]
    got = vtrace_returns(*facts, 0.9, *(float(x) for x in (lam, rho_bar, c_bar, policy_rho_bar)))
    want = vtrace_by_sums(rewards, values, ratios, mask, 0.9, lam, rho_bar, c_bar)
    close(got.targets, want)
    for b, t, own in decisions(mask):
        after = own[1] if len(own) > 1 else T
        following = values[b, T] if after == T else lam * want[b, after] + (1 - lam) * values[b, after]
        advantage = min(policy_rho_bar, ratios[b, t]) * (rewards[b, t] + 0.9 * following - values[b, t])
        close(got.advantages[b, t], advantage)


@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_on_policy_vtrace_is_gae_and_the_lambda_return(lam):
    rewards, values, mask, *_ = (narrow(x) for x in episodes(8))
    got = vtrace_returns(rewards, values, jnp.ones_like(rewards), mask, 0.9, lam)
    close(got.targets, lambda_returns(rewards, values, mask, 0.9, lam))
    close(got.advantages, gae(rewards, values, mask, 0.9, lam))


# ------------------------------------------------------------------------------------------------- exact enumeration

STEPS = 3
PATHS = np.array(list(product(range(2), repeat=STEPS)))  # every episode: two actions, three decisions
draw = np.random.default_rng(0)
NODE = np.array([[2**t - 1 + int("0" + "".join(map(str, path[:t])), 2) for t in range(STEPS)] for path in PATHS])
EARNED = draw.normal(size=(7, 2))
LOGITS, OTHER = draw.normal(size=(2, 7, 2))


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def chance(pi):
    """Probability of each episode, and of each of its decisions."""
    each = pi[NODE, PATHS]
    return each.prod(axis=1), each


def value_of(pi, gamma):
    """V at every node, backwards through the tree."""
    value = np.zeros(15)
    for node in reversed(range(7)):
        value[node] = sum(pi[node, a] * (EARNED[node, a] + gamma * value[2 * node + 1 + a]) for a in range(2))
    return value[:7]


def along_paths(node_values):
    return narrow(np.pad(node_values[NODE], ((0, 0), (0, 1))))


PAID = narrow(EARNED[NODE, PATHS])
ALL = jnp.ones((8, STEPS), bool)


def psi():
    exact = along_paths(value_of(softmax(LOGITS), 1.0))
    wrong = along_paths(np.linspace(-1, 2, 7))
    baseline = wrong[:, :-1]
    to_go = discounted_returns(PAID, ALL)
    return {
        "total return": jnp.broadcast_to(total_return(PAID, ALL)[:, None], to_go.shape),
        "reward to go": to_go,
        "with a baseline": to_go - baseline,
        "td residual": td_errors(PAID, exact, ALL),
        "gae": gae(PAID, exact, ALL, 1.0, 0.6),
        "gae, wrong values": gae(PAID, wrong, ALL, 1.0, 1.0),
        "two steps": n_step_returns(PAID, exact, ALL, 2),
        "v-trace on-policy": vtrace_returns(PAID, exact, jnp.ones_like(PAID), ALL, 1.0, 0.6).advantages,
    }


def expected_score(weights):
    """E_π Σ_t Ψ_t ∇ log π(a_t | s_t) by the logits."""
    pi, (probability, _) = softmax(LOGITS), chance(softmax(LOGITS))
    out = np.zeros((7, 2))
    for path, nodes, p, row in zip(PATHS, NODE, probability, np.asarray(weights), strict=True):
        for a, node, weight in zip(path, nodes, row, strict=True):
            out[node] += p * weight * (np.eye(2)[a] - pi[node])
    return out


@pytest.mark.parametrize("name", psi())
def test_every_psi_gives_the_gradient_of_the_expected_return(name):
    def objective(logits):
        each = jax.nn.softmax(logits)[NODE, PATHS]
        return (each.prod(axis=1) * PAID.sum(axis=1)).sum()

    close(expected_score(psi()[name]), jax.grad(objective)(narrow(LOGITS)))


def test_a_td_residual_of_wrong_values_is_biased():
    biased = expected_score(td_errors(PAID, along_paths(np.linspace(-1, 2, 7)), ALL))
    assert np.abs(biased - expected_score(psi()["reward to go"])).max() > 0.1


def test_unclipped_and_with_any_values_the_targets_average_to_the_value_of_the_other_policy():
    pi, mu = softmax(LOGITS), softmax(OTHER)
    probability, each = chance(mu)
    ratios, guess = narrow(chance(pi)[1] / each), along_paths(np.linspace(-1, 2, 7))
    error = corrected(PAID, guess, ratios, ALL, 0.9)
    close((probability * (error + guess[:, :-1])[:, 0]).sum(), value_of(pi, 0.9)[0])
    never = float("inf")
    target = vtrace_returns(PAID, guess, ratios, ALL, 0.9, 1.0, never, never).targets
    close((probability * target[:, 0]).sum(), value_of(pi, 0.9)[0])
    exact = along_paths(value_of(pi, 0.9))
    for lam in (0.0, 0.5, 1.0):
        close((probability * corrected(PAID, exact, ratios, ALL, 0.9, lam)[:, 0]).sum(), 0.0)


@pytest.mark.parametrize("rho_bar", [0.5, 1.0, 1.4])
def test_clipped_ratios_estimate_the_policy_between_the_two(rho_bar):
    """V-trace leaves alone the value of π_ρ̄ ∝ min(ρ̄ μ, π), and no other (IMPALA, theorem 1)."""
    pi, mu = softmax(LOGITS), softmax(OTHER)
    between = np.minimum(rho_bar * mu, pi)
    between /= between.sum(axis=1, keepdims=True)
    probability, each = chance(mu)
    fixed = along_paths(value_of(between, 0.9))
    target = vtrace_returns(
        PAID, fixed, narrow(chance(pi)[1] / each), ALL, 0.9, 1.0, rho_bar, min(rho_bar, 1.0)
    ).targets
    close((probability * target[:, 0]).sum(), fixed[0, 0])
    other = along_paths(value_of(pi, 0.9))
    target = vtrace_returns(
        PAID, other, narrow(chance(pi)[1] / each), ALL, 0.9, 1.0, rho_bar, min(rho_bar, 1.0)
    ).targets
    assert abs((probability * target[:, 0]).sum() - other[0, 0]) > 1e-3


# ------------------------------------------------------------------------------------------------------ masks, axes

EVERY = {
    "discounted returns": lambda r, v, w, m, g, e: returns.discounted_returns(r, m, g, v[..., -1]),
    "total return": lambda r, v, w, m, g, e: returns.total_return(r, m, g),
    "gae": lambda r, v, w, m, g, e: returns.gae(r, v, m, g, g, *e),
    "lambda returns": lambda r, v, w, m, g, e: returns.lambda_returns(r, v, m, g, g),
    "n steps": lambda r, v, w, m, g, e: returns.n_step_returns(r, v, m, 3, g),
    "v-trace": lambda r, v, w, m, g, e: returns.vtrace_returns(r, v, w, m, g, g),
    "corrected": lambda r, v, w, m, g, e: returns.importance_corrected_td_errors(r, v, w, m, g, g),
}


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", EVERY)
def test_what_stands_at_masked_columns_matters_neither_to_values_nor_to_gradients(name, garbage):
    rewards, values, mask, terminated, truncated, final_values = episodes(2)
    per_step = np.random.default_rng(2).uniform(0.2, 1.0, size=(2, B, T))
    spoil = lambda x: np.where(mask, x, garbage)  # noqa: E731
    dirty_values = np.concatenate([spoil(values[:, :-1]), values[:, -1:]], axis=1)
    ends = [narrow(x) for x in (terminated, truncated, final_values)]
    dirty_ends = [narrow(x) for x in (terminated | ~mask, truncated | ~mask, spoil(final_values))]

    def outcome(numbers, ends):
        out = EVERY[name](*numbers[:3], narrow(mask), numbers[3], ends)
        return jax.tree.reduce(lambda total, x: total + (x**2).sum(), out, 0.0), out

    run = jax.jit(jax.value_and_grad(outcome, has_aux=True))
    clean = run([narrow(x) for x in (rewards, values, *per_step)], ends)
    dirty = run([narrow(x) for x in (spoil(rewards), dirty_values, *map(spoil, per_step))], dirty_ends)
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", EVERY)
def test_without_a_mask_all_columns_are_decisions(name):
    rewards, values, _, *ends = episodes(1)
    numbers = [narrow(x) for x in (rewards, values, np.exp(rewards))]
    gamma, ends = narrow(np.random.default_rng(1).uniform(size=(B, T))), [narrow(x) for x in ends]

    def outcome(numbers, mask):
        out = EVERY[name](*numbers, mask, gamma, ends)
        return jax.tree.reduce(lambda total, x: total + (x**2).sum(), out, 0.0), out

    run = jax.jit(jax.value_and_grad(outcome, has_aux=True))
    for x, y in zip(*(jax.tree.leaves(run(numbers, mask)) for mask in (None, jnp.ones((B, T), bool))), strict=True):
        close(x, y)


@pytest.mark.parametrize("name", EVERY)
def test_leading_axes_are_free_and_the_width_is_that_of_the_input(name):
    rewards, values, mask, terminated, truncated, final_values = episodes(0)
    numbers = rewards, values, np.exp(rewards), mask, np.abs(np.tanh(rewards))
    ends = terminated, truncated, final_values
    run = jax.jit(EVERY[name])
    flat = run(*map(narrow, numbers), [narrow(x) for x in ends])
    stacked = run(*(narrow(x.reshape(2, 3, -1)) for x in numbers), [narrow(x.reshape(2, 3, -1)) for x in ends])
    row = run(*(narrow(x[1]) for x in numbers), [narrow(x[1]) for x in ends])
    for x, y, z in zip(*map(jax.tree.leaves, (flat, stacked, row)), strict=True):
        close(y.reshape(x.shape), x)
        close(z, x[1])
    with jax.enable_x64(True):
        wide = jax.jit(EVERY[name])(*map(jnp.asarray, numbers), list(map(jnp.asarray, ends)))
        assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float64")}
    for x, y in zip(*map(jax.tree.leaves, (flat, wide)), strict=True):
        close(x, y)


def test_rows_with_an_unjudged_decision_or_without_one_have_no_episode_reward():
    nan = np.nan
    rewards = narrow([[1.0, nan, 2.0], [1.0, nan, 2.0], [5.0, 5.0, 5.0]])
    mask = narrow([[True, False, True], [True, True, False], [False] * 3])
    total, judged = returns.episode_rewards(rewards, mask)
    np.testing.assert_array_equal(total, [3.0, 0.0, 0.0])
    np.testing.assert_array_equal(judged, [True, False, False])


def test_a_row_is_correct_by_the_first_score_that_it_has_whatever_else_it_is_paid_for():
    nan = np.nan
    rewards = narrow([[0.1], [1.0], [-0.4], [nan], [0.1], [5.0]])
    mask = narrow([[True]] * 5 + [[False]])
    scores = narrow([[0.0, 1.0], [1.0, 0.0], [1.0, nan], [1.0, 1.0], [nan, 1.0], [1.0, 1.0]])
    correct, judged = returns.correct_episodes(rewards, mask, scores)
    np.testing.assert_array_equal(correct, [False, True, True, False, True, False])
    np.testing.assert_array_equal(judged, [True, True, True, False, True, False])
    np.testing.assert_array_equal(returns.correct_episodes(rewards, mask, scores, 1.0)[0], [False] * 6)
    np.testing.assert_array_equal(returns.correct_episodes(rewards, mask)[0], [True, True, False, False, True, False])


def test_values_without_one_after_the_last_decision_are_refused():
    """Below the signatures, whose shapes are checked in tests alone."""
    rewards = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="values of 3 columns for 3 decisions; legal: 4"):
        returns._backward(lambda carry, *_: (carry, carry), jnp.zeros(2), None, rewards, rewards)
