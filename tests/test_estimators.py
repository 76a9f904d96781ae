"""What experiments/tables/estimators.py must find: values known otherwise, and the same sums in numpy."""

import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.tables import estimators
from experiments.tables.exact import credit, divergences, gradients, language, problems
from rljax.algorithms import (
    dr_grpo,
    grpo,
    lcpo_exact,
    maxrl,
    nsr,
    off_policy_pg,
    opmd,
    pass_at_k_training,
    ppo,
    prime,
    psr,
    raft,
    reinforce,
    remax,
    rft,
    topr,
    w_reinforce,
)
from rljax.algorithms.reinforce import group_mean_baseline
from rljax.ops.ratios import token_level
from rljax.ops.weights import seq_mean_token_mean, seq_mean_token_sum

PAGE = Path(__file__).resolve().parents[1] / "docs" / "estimators.md"
SMALL_EPSILON = 1e-13  # too small to change the standard deviations of these rewards
NEAR = 0.1  # KL(behavior ‖ policy), nats
FAR = 0.5


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def random_problem(tree, binary=False):
    return problems.random_problem(tree, 0, binary)[0]


def measured(algorithms, tree, stack, group_size):
    return gradients.measure_gradients(algorithms, [seq_mean_token_mean, seq_mean_token_sum], tree, stack, group_size)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def completions_of(vocab_size, length):
    """Every completion as a tuple of tokens, by recursion."""

    def grow(prefix):
        for token in range(vocab_size):
            longer = (*prefix, token)
            yield from [longer] if token == 0 or len(longer) == length else grow(longer)

    return list(grow(()))


def by_hand(tree, problem):
    """Completions in the order of `tree`, their scores ∇ log π(y) [N S·V], probabilities [N] and rewards [N]."""
    numbers = {}
    for row, tokens, inside in zip(tree.prefix, tree.actions, tree.mask, strict=True):
        for t in np.flatnonzero(inside):
            numbers[tuple(tokens[:t])] = row[t]
    pi = softmax(np.float64(problem.policy))
    completions = [tuple(tokens[inside]) for tokens, inside in zip(tree.actions, tree.mask, strict=True)]
    score = np.zeros((len(completions), *pi.shape))
    probs = np.ones(len(completions))
    for i, y in enumerate(completions):
        for t, token in enumerate(y):
            s = numbers[y[:t]]
            score[i, s] += np.eye(pi.shape[1])[token] - pi[s]
            probs[i] *= pi[s, token]
    return completions, score.reshape(len(completions), -1), probs, np.float64(problem.rewards)


@pytest.mark.parametrize(("vocab_size", "length", "count"), [(3, 3, 15), (4, 3, 40), (4, 1, 4), (2, 4, 5)])
def test_every_completion_is_listed_once(vocab_size, length, count):
    tree = language.make_tree(vocab_size, length)
    completions, _, probs, _ = by_hand(tree, random_problem(tree))
    assert sorted(completions) == sorted(completions_of(vocab_size, length))
    assert len(completions) == count
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.exp(language.sequence_logps(tree, random_problem(tree).policy)), probs, rtol=1e-12)
    np.testing.assert_array_equal(tree.ended, [y[-1] == 0 for y in completions])


def test_the_truths_are_those_of_score_functions():
    tree = language.make_tree(3, 3)
    problem = random_problem(tree)
    _, score, probs, R = by_hand(tree, problem)
    reference = by_hand(tree, problem._replace(policy=problem.reference))[2]
    length = tree.mask.sum(1)
    truths = gradients.objective_gradients(tree, problem, 3)
    J = probs @ R
    below = np.array([probs[r > R].sum() for r in R])
    pay = {
        "J": R,
        "J_β": R - gradients.BETA * np.log(probs / reference),
        "J per token": (R - J) / length,
        "wins": 2 * below + probs - 1,
        "best of G": 3 * (np.maximum.outer(R, np.maximum.outer(R, R)) @ probs @ probs),
    }
    for name, h in pay.items():
        np.testing.assert_allclose(truths[name], (probs * h) @ score, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.fixture(scope="module")
def in_pairs():
    with jax.enable_x64(True):
        tree = language.make_tree(3, 3)
        stack = [random_problem(tree), random_problem(tree, binary=True)]
        stack += problems.random_problems(tree, 0, (NEAR, FAR))[1:]
        algorithms = {
            "group mean": reinforce(group_mean_baseline),
            "RLOO": reinforce(),
            "Dr.GRPO": dr_grpo(3.0),
            "GRPO": grpo(std_epsilon=SMALL_EPSILON),
            "PPO": ppo(),
            "ReMax": remax(),
            "sequence ratio": off_policy_pg(),
            "token ratio": off_policy_pg(token_level),
        }
        return tree, stack, measured(algorithms, tree, stack, 2)


OWN, MEAN, SUM = range(3)  # weightings: the algorithm's own, seq_mean_token_mean, seq_mean_token_sum


def test_mean_and_variance_over_pairs_are_those_of_a_plain_loop(in_pairs):
    tree, (problem, *_), found = in_pairs
    _, score, probs, R = by_hand(tree, problem)
    pairs = list(itertools.product(range(15), repeat=2))
    g = np.array([0.5 * (R[i] - R[j]) * (score[i] - score[j]) for i, j in pairs])
    p = np.array([probs[i] * probs[j] for i, j in pairs])
    mean, variance = found["RLOO"]
    np.testing.assert_allclose(mean[0, OWN], p @ g, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variance[0, OWN], p @ ((g - p @ g) ** 2).sum(1), rtol=1e-9)


def test_baselines_scale_the_gradient_by_what_they_contain_of_the_completion(in_pairs):
    tree, (problem, *_), found = in_pairs
    _, score, probs, R = by_hand(tree, problem)
    J = (probs * R) @ score
    for name, scale in {"RLOO": 1, "ReMax": 1, "group mean": 1 / 2, "Dr.GRPO": 1 / 6}.items():
        np.testing.assert_allclose(found[name][0][0, OWN], scale * J, rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_numbers_decide_what_an_objective_is_named(in_pairs):
    tree, (problem, *_), found = in_pairs
    truths = gradients.objective_gradients(tree, problem, 2)

    def named(name, weighting):
        return gradients.name_objective(found[name][0][0, weighting], truths)

    assert named("RLOO", OWN) == "J"
    assert named("group mean", OWN) == "1/2 · J"
    assert named("RLOO", MEAN) == "J per token"
    assert named("GRPO", SUM) == f"{2**-0.5:.3g} · wins"
    assert named("GRPO", MEAN) == f"{2**-0.5:.3g} · wins per token"
    assert named("PPO", OWN) == "–"
    assert gradients.name_objective(0 * truths["J"], truths) == "0"
    assert gradients.name_objective(truths["J"].at[0].add(1e-4), truths) == "–"


def grpo_weight(p, G):
    k = np.arange(G + 1)
    binomial = np.array([math.comb(G, i) for i in k]) * p**k * (1 - p) ** (G - k)
    return (binomial * np.sqrt(k * (G - k) * (G - 1) / G**3)).sum() / (p * (1 - p))


def test_with_right_and_wrong_completions_grpo_weighs_a_prompt_by_its_odds(in_pairs):
    """Under seq_mean_token_sum whatever the lengths; terms divided by the completion's length climb something else."""
    tree, (_, binary, *_), found = in_pairs
    _, score, probs, R = by_hand(tree, binary)
    J, mean = (probs * R) @ score, found["GRPO"][0][1]
    np.testing.assert_allclose(mean[SUM], grpo_weight(probs @ R, 2) * J, rtol=1e-9, atol=1e-11)
    assert gradients.compare_gradients(mean[MEAN], J)["cosine"] < 0.999


@pytest.fixture(scope="module")
def of_outcomes():
    """Methods that weight or select whole completions, in pairs: with rewards of any size, of 0 and 1, and far off."""
    with jax.enable_x64(True):
        tree = language.make_tree(3, 3)
        stack = [random_problem(tree), random_problem(tree, binary=True), problems.random_problems(tree, 0, (FAR,))[1]]
        algorithms = {
            "PSR": psr(),
            "NSR": nsr(),
            "W-REINFORCE": w_reinforce(),
            "RAFT": raft(),
            "RFT": rft(),
            "OPMD": opmd(0.3),
            "TOPR": topr(),
            "PRIME": prime(0.2),
            "exact length": lcpo_exact(reinforce(), 2, 0.2),
        }
        return tree, stack, measured(algorithms, tree, stack, 2)


def test_positive_and_negative_samples_have_one_mean_gradient_and_different_variances(of_outcomes):
    tree, (_, binary, _), found = of_outcomes
    _, score, probs, R = by_hand(tree, binary)
    for name, scale in {"PSR": 1, "NSR": 1, "W-REINFORCE": 1.1}.items():
        np.testing.assert_allclose(found[name][0][1, OWN], scale * (probs * R) @ score, rtol=1e-9, atol=1e-12)
    assert abs(found["PSR"][1][1, OWN] / found["NSR"][1][1, OWN] - 1) > 0.1


def test_the_best_of_two_climbs_wins_and_accepted_samples_imitate_themselves(of_outcomes):
    """RFT: the score of a right completion, if there is one in the pair."""
    tree, (problem, binary, _), found = of_outcomes
    truths = gradients.objective_gradients(tree, problem, 2)
    assert gradients.name_objective(found["RAFT"][0][0, SUM], truths) == "wins"
    _, score, probs, R = by_hand(tree, binary)
    right = probs @ R
    want = (2 * right - right**2) / right * (probs * R) @ score
    np.testing.assert_allclose(found["RFT"][0][1, SUM], want, rtol=1e-9, atol=1e-12)


def test_mirror_descent_and_tapered_weights_are_biased_off_policy_as_their_equations_say(of_outcomes):
    tree, (problem, _, moved), found = of_outcomes
    _, score, pi, R = by_hand(tree, problem)
    mu = by_hand(tree, moved._replace(policy=moved.behavior))[2]
    np.testing.assert_allclose(found["TOPR"][0][0, OWN], (pi * R) @ score, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["OPMD"][0][0, OWN], 0.5 * (pi * R) @ score, rtol=1e-9, atol=1e-12)
    tapered = np.where(R < 0, np.minimum(pi / mu, 1), 1) * R
    np.testing.assert_allclose(found["TOPR"][0][2, OWN], (mu * tapered) @ score, rtol=1e-9, atol=1e-12)
    pulled = 0.5 * (R - mu @ R) - 0.3 * np.log(pi / mu)
    np.testing.assert_allclose(found["OPMD"][0][2, OWN], (mu * pulled) @ score, rtol=1e-9, atol=1e-12)


def test_process_rewards_of_a_model_are_climbed_with_the_outcome(of_outcomes):
    """PRIME climbs E R + β E log π_φ/π_ref of whole completions, less the baseline's value times E n: it is subtracted
    at each token, so that it also pays for short completions, or for long ones.
    """
    tree, (problem, *_), found = of_outcomes
    _, score, probs, R = by_hand(tree, problem)
    teacher, reference = (by_hand(tree, problem._replace(policy=x))[2] for x in (problem.teacher, problem.reference))
    want = (probs * (R + 0.2 * np.log(teacher / reference))) @ score
    lengths = tree.mask.sum(1)
    process = 0.2 * np.log(teacher / reference) / lengths
    want -= (probs * (probs @ process) * lengths) @ score
    np.testing.assert_allclose(found["PRIME"][0][0, SUM], want, rtol=1e-9, atol=1e-12)
    want = (probs * (R - 0.2 * np.abs(lengths - 2))) @ score
    np.testing.assert_allclose(found["exact length"][0][0, OWN], want, rtol=1e-9, atol=1e-12)


def pass_at_k_weight(p, G, k):
    """The mean over c correct of G of (c Â_pos (1 - p) - (G - c) Â_neg p)/G, over p (1 - p)."""
    total = 0.0
    for c in range(G + 1):
        mean = 1 - math.comb(G - c, k) / math.comb(G, k)
        if 0 < mean < 1:
            std = math.sqrt(mean * (1 - mean))
            positive = (1 - mean) / std
            negative = (1 - mean - math.comb(G - c - 1, k - 1) / math.comb(G - 1, k - 1)) / std
            chance = math.comb(G, c) * p**c * (1 - p) ** (G - c)
            total += chance * (c * positive * (1 - p) - (G - c) * negative * p) / G
    return total / (p * (1 - p))


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_weights_of_prompts_are_those_of_the_binomial(group_size):
    tree = language.make_tree(2, 1)
    probs = (0.05, 0.3, 0.9)
    algorithms = {
        "GRPO": grpo(std_epsilon=SMALL_EPSILON),
        "MaxRL": maxrl(),
        "Dr.GRPO": dr_grpo(1.0),
        "RLOO": reinforce(),
        "RFT": rft(),
        "pass@2": pass_at_k_training(2),
    }
    found = gradients.measure_gradients(algorithms, (), tree, [problems.coin_flip(p) for p in probs], group_size)
    for i, p in enumerate(probs):
        slope = p * (1 - p) * np.array([-1.0, 1.0])
        want = {
            "GRPO": grpo_weight(p, group_size),
            "MaxRL": sum((1 - p) ** (k - 1) for k in range(1, group_size)),  # of Σ_{k<G} pass@k / k
            "Dr.GRPO": (group_size - 1) / group_size,
            "RLOO": 1.0,
            "RFT": sum((1 - p) ** (k - 1) for k in range(1, group_size + 1)),  # MaxRL's, one term more
            "pass@2": pass_at_k_weight(p, group_size, 2),
        }
        for name, weight in want.items():
            np.testing.assert_allclose(found[name][0][i, OWN], weight * slope, rtol=1e-9, err_msg=name)


def test_off_policy_only_the_ratio_of_the_completion_keeps_the_gradient(in_pairs):
    tree, (problem, _, near, far), found = in_pairs
    _, score, probs, R = by_hand(tree, problem)
    J = (probs * R) @ score
    for number, (moved, nats) in enumerate([(near, NEAR), (far, FAR)], start=2):
        mu = by_hand(tree, moved._replace(policy=moved.behavior))[2]
        np.testing.assert_allclose(mu @ np.log(mu / probs), nats, rtol=1e-9)
        np.testing.assert_allclose(found["sequence ratio"][0][number, OWN], J, rtol=1e-9, atol=1e-11)
        for name in ("token ratio", "RLOO", "GRPO"):
            assert gradients.compare_gradients(found[name][0][number, OWN], J)["cosine"] < 0.995, name


# ------------------------------------------------------------------------------------------------- KL estimators

SEQUENCE = f"∇ {divergences.FORWARD_SEQUENCE}"
VISITS = f"∇ {divergences.FORWARD_VISITS}"
REVERSE = f"∇ {divergences.REVERSE_VISITS}"


@pytest.mark.parametrize("length", [1, 3])
def test_what_kl_estimators_regularise(length):
    tree = language.make_tree(3, length)
    problem, moved = problems.random_problems(tree, 0, (NEAR,))
    on = divergences.measure_kl_estimators(tree, problem)
    off = divergences.measure_kl_estimators(tree, moved)
    exact = {
        "k2": VISITS,
        "k1_with_k2_gradient": VISITS,
        "k3_with_k2_gradient": VISITS,
        "k3": REVERSE,
        "importance_weighted_k1": VISITS,
        "importance_weighted_k2": VISITS,
        "importance_weighted_k3": VISITS,
        "k3 · ratio of the completion so far": SEQUENCE,
        "k1 in the reward, own token's": VISITS,
        "k1 in the reward, this and later tokens'": SEQUENCE,
    }
    kept = {name for name in exact if "importance" in name or "so far" in name}
    for name, target in exact.items():
        assert on[name][target] < 1e-9, name
        assert (off[name][target] < 1e-9) == (name in kept), name
        same = {SEQUENCE, VISITS} if length == 1 and target != REVERSE else {target}
        assert min(on[name][x] for x in {SEQUENCE, VISITS, REVERSE} - same) > 1e-2, name
    assert all(abs(on["k1"][x] - 1) < 1e-9 for x in (SEQUENCE, VISITS, REVERSE))  # its gradient is 0 on average
    unbiased = {"k1", "k3", "k1_with_k2_gradient", "k3_with_k2_gradient", "importance_weighted_k1"}
    for name in unbiased | {"importance_weighted_k3", "k3 · ratio of the completion so far"}:
        assert abs(on[name]["value / KL(π‖ref) of completions"] - 1) < 1e-9, name
    for name in ("importance_weighted_k1", "importance_weighted_k3"):
        assert abs(off[name]["value / KL(π‖ref) at visits"] - 1) < 1e-9, name
    assert abs(off["k3 · ratio of the completion so far"]["value / KL(π‖ref) of completions"] - 1) < 1e-9
    assert abs(on["k2"]["value / KL(π‖ref) of completions"] - 1) > 1e-2


def test_the_exact_kls_are_those_of_score_functions():
    tree = language.make_tree(3, 3)
    problem = random_problem(tree)
    _, score, probs, _ = by_hand(tree, problem)
    d = np.log(probs / by_hand(tree, problem._replace(policy=problem.reference))[2])
    value, slope = jax.value_and_grad(divergences.kl_targets(tree, problem)["KL(π‖ref) of completions"])(problem.policy)
    np.testing.assert_allclose(value, probs @ d, rtol=1e-12)
    np.testing.assert_allclose(slope.ravel(), (probs * d) @ score, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- credit


def weighted_correlation(x, y, weights):
    (xx, xy), (_, yy) = np.cov(x, y, aweights=weights, ddof=0)
    return xy / np.sqrt(xx * yy)


def decisions(tree, problem):
    """(completion, prefix, longer prefix, probability of the completion, A) of every token, from its prefixes."""
    completions, _, probs, R = by_hand(tree, problem)

    def V(prefix):
        inside = [i for i, y in enumerate(completions) if y[: len(prefix)] == prefix]
        return (probs[inside] @ R[inside]) / probs[inside].sum()

    return [
        (i, y[:t], y[: t + 1], probs[i], V(y[: t + 1]) - V(y[:t]))
        for i, y in enumerate(completions)
        for t in range(len(y))
    ]


def test_credit_of_the_outcome_and_of_an_exact_critic():
    tree = language.make_tree(3, 3)
    problem = random_problem(tree)
    rows = decisions(tree, problem)
    exact = credit.exact_decisions(tree, problem)
    R = np.float64(problem.rewards)
    want = weighted_correlation([R[i] for i, *_ in rows], [A for *_, A in rows], [p for *_, p, _ in rows])
    got = credit.agreement(exact, R[:, None] + 0.0 * tree.mask)
    np.testing.assert_allclose(got["one"], want, rtol=1e-9)
    assert got["one"] < got["mean"] < 1
    np.testing.assert_allclose(list(credit.gae_agreement(exact, exact.values, 0.0).values()), 1.0, rtol=1e-9)
    full = credit.gae_agreement(exact, exact.values, 1.0)
    assert full["one"] < 0.9
    np.testing.assert_allclose(full["mean"], 1.0, rtol=1e-9)
    np.testing.assert_allclose(credit.gae_agreement(exact, 0 * exact.values, 1.0)["one"], want, rtol=1e-9)


def test_prefix_rollouts_in_closed_form_are_those_listed_one_by_one():
    tree = language.make_tree(3, 2)
    problem = random_problem(tree)
    completions, _, probs, R = by_hand(tree, problem)

    def rollouts(prefix):
        inside = [i for i, y in enumerate(completions) if y[: len(prefix)] == prefix]
        return [(probs[i] / probs[inside].sum(), R[i]) for i in inside]

    x = []
    y = []
    weights = []
    for _, before, after, p, A in decisions(tree, problem):
        for (q, reward), (r, other_reward) in itertools.product(rollouts(after), rollouts(before)):
            x.append(reward - other_reward)
            y.append(A)
            weights.append(p * q * r)
    got = credit.prefix_rollout_agreement(credit.exact_decisions(tree, problem), 1)
    np.testing.assert_allclose(got["one"], weighted_correlation(x, y, weights), rtol=1e-9)
    np.testing.assert_allclose(got["mean"], 1.0, rtol=1e-9)


def test_credit_of_groups_is_that_of_a_plain_loop():
    tree = language.make_tree(3, 2)
    problem = random_problem(tree)
    rows = decisions(tree, problem)
    R = np.float64(problem.rewards)
    _, _, probs, _ = by_hand(tree, problem)
    x = [R[i] - R[j] for i, *_ in rows for j in range(len(R))]
    y = [A for *_, A in rows for _ in R]
    weights = [p * q for *_, p, _ in rows for q in probs]
    got = credit.group_agreement(credit.exact_decisions(tree, problem), reinforce(), 2)
    np.testing.assert_allclose(got["one"], weighted_correlation(x, y, weights), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ page


def test_the_page_lists_every_algorithm():
    text = PAGE.read_text()
    assert not [name for name in estimators.ALGORITHMS if name not in text]
    assert "{{" not in text


def everything(text):
    """{weighting: {algorithm: {column: cell}}} of the last section."""
    found = {}
    for block in text.split("## Everything")[1].split("<details>")[1:]:
        title = block.split("<summary>")[1].split("</summary>")[0]
        header, _, *rows = (
            [x.strip() for x in line.split("|")[1:-1]] for line in block.splitlines() if line[:1] == "|"
        )
        each = ((name, dict(zip(header, row, strict=True))) for row in rows for name in row[0].split("; "))
        found[title] = dict(each)
    return found


def test_every_algorithm_has_all_its_numbers_under_every_weighting():
    found = everything(PAGE.read_text())
    assert list(found) == ["the algorithm's own", *estimators.WEIGHTINGS]
    names = {"MaxRL[^maxrl]" if name == "MaxRL" else name for name in estimators.ALGORITHMS}
    want = {f"{what}, {d}" for what in ("climbs", "bias", "∇J", "∇J_β", "var") for d in ("0", "0.01", "0.1", "0.5")}
    for title, rows in found.items():
        assert set(rows) == names, title
        assert all(set(row) == want | {"algorithm"} for row in rows.values()), title


def test_where_rewards_are_normal_maxrl_is_outside_its_domain():
    text = PAGE.read_text()
    within = text.split("## Prompts")[1].split("## Estimators")[0]
    assert "[^maxrl]" not in within
    assert "| MaxRL" in within
    assert "\n[^maxrl]: " in text
    marked = [line for line in text.replace(within, "").splitlines() if line[:1] == "|" and "MaxRL" in line]
    assert len(marked) == 10  # five tables above, five weightings
    assert all("MaxRL[^maxrl]" in line for line in marked)


@pytest.mark.parametrize("weighting", list(estimators.WEIGHTINGS))
def test_printed_numbers_are_those_of_a_plain_loop(weighting):
    """Of leave one out over triples, whose samples come from the behavior policy and whose loss has no ratio."""
    tree = language.make_tree(3, 3)
    length = np.float64(tree.mask.sum(1))
    found = everything(PAGE.read_text())
    stack = problems.random_problems(tree, estimators.Config().seed, estimators.Config().kls)
    triples = np.array(list(itertools.product(range(15), repeat=3)))
    for problem, nats in zip(stack, ("0", "0.01", "0.1", "0.5"), strict=True):
        _, score, probs, R = by_hand(tree, problem)
        reference = by_hand(tree, problem._replace(policy=problem.reference))[2]
        truth = (probs * R) @ score
        regularized = (probs * (R - gradients.BETA * np.log(probs / reference))) @ score
        p = by_hand(tree, problem._replace(policy=problem.behavior))[2][triples].prod(1)
        share = {
            "token_mean": 1 / np.repeat(length[triples].sum(1), 3).reshape(-1, 3),
            "seq_mean_token_mean": 1 / length[triples] / 3,
            "seq_mean_token_sum": np.ones(triples.shape) / 3,
            "seq_mean_token_sum_norm": np.ones(triples.shape) / 9,
        }[weighting]
        advantages = 1.5 * (R[triples] - R[triples].mean(1)[:, None])
        g = np.einsum("ij,ijk->ik", share * advantages, score[triples])
        mean = p @ g
        size = np.linalg.norm(truth)
        scale = mean @ truth / size**2
        want = {
            "bias": np.linalg.norm(mean - truth) / size,
            "∇J": mean @ truth / size / np.linalg.norm(mean),
            "∇J_β": mean @ regularized / np.linalg.norm(regularized) / np.linalg.norm(mean),
            "var": p @ ((g - mean) ** 2).sum(1) / (scale * size) ** 2,
        }
        row = found[weighting]["REINFORCE, leave one out"]
        for what, number in want.items():
            np.testing.assert_allclose(float(row[f"{what}, {nats}"]), number, rtol=6e-3, atol=1e-8, err_msg=what)


@pytest.mark.nightly
def test_the_page_is_what_the_command_writes(tmp_path):
    assert estimators.main(estimators.Config(file=str(tmp_path / "page.md"))) == PAGE.read_text()
