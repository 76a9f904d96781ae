"""What experiments/tables/estimators.py must find: values known from elsewhere, and sums done again here, in numpy."""

import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import estimators
from exact import credit, divergences, gradients, language, worlds
from rljax.algorithms import dr_grpo, grpo, maxrl, off_policy_pg, ppo, reinforce, remax
from rljax.algorithms.reinforce import group_mean_baseline
from rljax.ops.ratios import token_level
from rljax.ops.weights import seq_mean_token_mean, seq_mean_token_sum

PAGE = Path(__file__).resolve().parents[1] / "docs" / "estimators.md"
SHARP = 1e-13  # an ε that the deviations of these rewards do not feel
NEAR, FAR = 0.1, 0.5


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def random_world(lm, binary=False):
    return worlds.random_world(lm, 0, binary)[0]


def measured(algorithms, lm, places, answers):
    return gradients.measure(algorithms, [seq_mean_token_mean, seq_mean_token_sum], lm, places, answers)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def answers_of(vocabulary, length):
    """Every answer as a tuple of tokens, and prefixes by number: written again, recursively."""

    def grow(prefix):
        for token in range(vocabulary):
            longer = (*prefix, token)
            yield from [longer] if token == 0 or len(longer) == length else grow(longer)

    return list(grow(()))


def by_hand(lm, world):
    """Answers in the order of `lm`, π, the score ∇ log π(y) of each answer [N S·V], its chance and its reward."""
    numbers = {}
    for row, choice, inside in zip(lm.prefix, lm.actions, lm.mask, strict=True):
        for t in np.flatnonzero(inside):
            numbers[tuple(choice[:t])] = row[t]
    pi = softmax(np.float64(world.policy))
    said = [tuple(choice[inside]) for choice, inside in zip(lm.actions, lm.mask, strict=True)]
    score, chance = np.zeros((len(said), *pi.shape)), np.ones(len(said))
    for i, y in enumerate(said):
        for t, token in enumerate(y):
            s = numbers[y[:t]]
            score[i, s] += np.eye(pi.shape[1])[token] - pi[s]
            chance[i] *= pi[s, token]
    return said, score.reshape(len(said), -1), chance, np.float64(world.rewards)


@pytest.mark.parametrize(("vocabulary", "length", "count"), [(3, 3, 15), (4, 3, 40), (4, 1, 4), (2, 4, 5)])
def test_every_answer_is_listed_once(vocabulary, length, count):
    lm = language.tree(vocabulary, length)
    said, _, chance, _ = by_hand(lm, random_world(lm))
    assert sorted(said) == sorted(answers_of(vocabulary, length))
    assert len(said) == count
    np.testing.assert_allclose(chance.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.exp(language.log_prob(lm, random_world(lm).policy)), chance, rtol=1e-12)
    np.testing.assert_array_equal(lm.ended, [y[-1] == 0 for y in said])


def test_the_truths_are_those_of_score_functions():
    lm = language.tree(3, 3)
    world = random_world(lm)
    _, score, chance, R = by_hand(lm, world)
    reference = by_hand(lm, world._replace(policy=world.reference))[2]
    length = lm.mask.sum(1)
    truths = gradients.objectives(lm, world, 3)
    J = chance @ R
    below = np.array([chance[r > R].sum() for r in R])
    pay = {
        "J": R,
        "J_β": R - gradients.BETA * np.log(chance / reference),
        "J per token": (R - J) / length,
        "wins": 2 * below + chance - 1,
        "best of G": 3 * (np.maximum.outer(R, np.maximum.outer(R, R)) @ chance @ chance),
    }
    for name, h in pay.items():
        np.testing.assert_allclose(truths[name], (chance * h) @ score, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.fixture(scope="module")
def in_pairs():
    with jax.enable_x64(True):
        lm = language.tree(3, 3)
        places = [random_world(lm), random_world(lm, binary=True), *worlds.moved(lm, 0, (NEAR, FAR))[1:]]
        algorithms = {
            "group mean": reinforce(group_mean_baseline),
            "RLOO": reinforce(),
            "Dr.GRPO": dr_grpo(3.0),
            "GRPO": grpo(std_epsilon=SHARP),
            "PPO": ppo(),
            "ReMax": remax(),
            "ratio of answers": off_policy_pg(),
            "ratio of tokens": off_policy_pg(token_level),
        }
        return lm, places, measured(algorithms, lm, places, 2)


OWN, MEAN, SUM = 0, 1, 2


def test_mean_and_variance_over_pairs_are_those_of_a_plain_loop(in_pairs):
    lm, (world, *_), found = in_pairs
    _, score, chance, R = by_hand(lm, world)
    pairs = list(itertools.product(range(15), repeat=2))
    g = np.array([0.5 * (R[i] - R[j]) * (score[i] - score[j]) for i, j in pairs])
    p = np.array([chance[i] * chance[j] for i, j in pairs])
    mean, variance = found["RLOO"]
    np.testing.assert_allclose(mean[0, OWN], p @ g, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variance[0, OWN], p @ ((g - p @ g) ** 2).sum(1), rtol=1e-9)


def test_baselines_scale_the_gradient_by_what_they_contain_of_the_answer(in_pairs):
    lm, (world, *_), found = in_pairs
    _, score, chance, R = by_hand(lm, world)
    J = (chance * R) @ score
    for name, scale in {"RLOO": 1, "ReMax": 1, "group mean": 1 / 2, "Dr.GRPO": 1 / 6}.items():
        np.testing.assert_allclose(found[name][0][0, OWN], scale * J, rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_numbers_decide_what_an_objective_is_called(in_pairs):
    lm, (world, *_), found = in_pairs
    truths = gradients.objectives(lm, world, 2)
    called = lambda name, w: gradients.name_of(found[name][0][0, w], truths)  # noqa: E731
    assert called("RLOO", OWN) == "J"
    assert called("group mean", OWN) == "1/2 · J"
    assert called("RLOO", MEAN) == "J per token"
    assert called("GRPO", SUM) == f"{2**-0.5:.3g} · wins"
    assert called("GRPO", MEAN) == f"{2**-0.5:.3g} · wins per token"
    assert called("PPO", OWN) == "–"
    assert gradients.name_of(0 * truths["J"], truths) == "0"
    assert gradients.name_of(truths["J"].at[0].add(1e-4), truths) == "–"


def grpo_weight(p, G):
    k = np.arange(G + 1)
    odds = np.array([math.comb(G, i) for i in k]) * p**k * (1 - p) ** (G - k)
    return (odds * np.sqrt(k * (G - k) * (G - 1) / G**3)).sum() / (p * (1 - p))


def test_with_right_and_wrong_answers_grpo_weighs_a_prompt_by_its_odds(in_pairs):
    """Under seq_mean_token_sum whatever the lengths; divided by their own lengths answers climb something else."""
    lm, (_, binary, *_), found = in_pairs
    _, score, chance, R = by_hand(lm, binary)
    J, mean = (chance * R) @ score, found["GRPO"][0][1]
    np.testing.assert_allclose(mean[SUM], grpo_weight(chance @ R, 2) * J, rtol=1e-9, atol=1e-11)
    assert gradients.compare(mean[MEAN], J)["cosine"] < 0.999


@pytest.mark.parametrize("answers", [2, 3, 8])
def test_weights_of_prompts_are_those_of_the_binomial(answers):
    coin, odds = language.tree(2, 1), (0.05, 0.3, 0.9)
    algorithms = {"GRPO": grpo(std_epsilon=SHARP), "MaxRL": maxrl(), "Dr.GRPO": dr_grpo(1.0), "RLOO": reinforce()}
    found = gradients.measure(algorithms, (), coin, [worlds.coin(p) for p in odds], answers)
    for i, p in enumerate(odds):
        slope = p * (1 - p) * np.array([-1.0, 1.0])
        want = {
            "GRPO": grpo_weight(p, answers),
            "MaxRL": sum((1 - p) ** (k - 1) for k in range(1, answers)),  # of Σ_{k<G} pass@k / k
            "Dr.GRPO": (answers - 1) / answers,
            "RLOO": 1.0,
        }
        for name, weight in want.items():
            np.testing.assert_allclose(found[name][0][i, OWN], weight * slope, rtol=1e-9, err_msg=name)


def test_off_policy_only_the_ratio_of_the_answer_keeps_the_gradient(in_pairs):
    lm, (world, _, near, far), found = in_pairs
    _, score, chance, R = by_hand(lm, world)
    J = (chance * R) @ score
    for place, (moved, nats) in enumerate([(near, NEAR), (far, FAR)], start=2):
        mu = by_hand(lm, moved._replace(policy=moved.behaviour))[2]
        np.testing.assert_allclose(mu @ np.log(mu / chance), nats, rtol=1e-9)
        np.testing.assert_allclose(found["ratio of answers"][0][place, OWN], J, rtol=1e-9, atol=1e-11)
        for name in ("ratio of tokens", "RLOO", "GRPO"):
            assert gradients.compare(found[name][0][place, OWN], J)["cosine"] < 0.995, name


# ------------------------------------------------------------------------------------------------- KL estimators

ANSWERS, VISITS, OTHER = "∇ KL(π‖ref) of answers", "∇ KL(π‖ref) at visits", "∇ KL(ref‖π) at visits"


@pytest.mark.parametrize("length", [1, 3])
def test_what_kl_estimators_regularise(length):
    lm = language.tree(3, length)
    world, moved = worlds.moved(lm, 0, (NEAR,))
    on, off = divergences.distances(lm, world), divergences.distances(lm, moved)
    exact = {
        "k2": VISITS,
        "k1_with_k2_gradient": VISITS,
        "k3_with_k2_gradient": VISITS,
        "k3": OTHER,
        "importance_weighted_k1": VISITS,
        "importance_weighted_k2": VISITS,
        "importance_weighted_k3": VISITS,
        "k3 · ratio of the answer so far": ANSWERS,
        "k1 in the reward, own token's": VISITS,
        "k1 in the reward, this and later tokens'": ANSWERS,
    }
    kept = {name for name in exact if "importance" in name or "so far" in name}
    for name, target in exact.items():
        assert on[name][target] < 1e-9, name
        assert (off[name][target] < 1e-9) == (name in kept), name
        same = {ANSWERS, VISITS} if length == 1 and target != OTHER else {target}
        assert min(on[name][x] for x in {ANSWERS, VISITS, OTHER} - same) > 1e-2, name
    assert all(abs(on["k1"][x] - 1) < 1e-9 for x in (ANSWERS, VISITS, OTHER))  # its gradient is 0 on average
    unbiased = {"k1", "k3", "k1_with_k2_gradient", "k3_with_k2_gradient", "importance_weighted_k1"}
    for name in unbiased | {"importance_weighted_k3", "k3 · ratio of the answer so far"}:
        assert abs(on[name]["value / KL(π‖ref) of answers"] - 1) < 1e-9, name
    for name in ("importance_weighted_k1", "importance_weighted_k3"):
        assert abs(off[name]["value / KL(π‖ref) at visits"] - 1) < 1e-9, name
    assert abs(off["k3 · ratio of the answer so far"]["value / KL(π‖ref) of answers"] - 1) < 1e-9
    assert abs(on["k2"]["value / KL(π‖ref) of answers"] - 1) > 1e-2


def test_the_exact_kls_are_those_of_score_functions():
    lm = language.tree(3, 3)
    world = random_world(lm)
    _, score, chance, _ = by_hand(lm, world)
    d = np.log(chance / by_hand(lm, world._replace(policy=world.reference))[2])
    value, slope = jax.value_and_grad(divergences.targets(lm, world)["KL(π‖ref) of answers"])(world.policy)
    np.testing.assert_allclose(value, chance @ d, rtol=1e-12)
    np.testing.assert_allclose(slope.ravel(), (chance * d) @ score, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- credit


def weighted_correlation(x, y, weights):
    (xx, xy), (_, yy) = np.cov(x, y, aweights=weights, ddof=0)
    return xy / np.sqrt(xx * yy)


def decisions(lm, world):
    """(answer, prefix, longer prefix, chance of the answer, A) of every decision, by recursion over prefixes."""
    said, _, chance, R = by_hand(lm, world)

    def V(prefix):
        inside = [i for i, y in enumerate(said) if y[: len(prefix)] == prefix]
        return (chance[inside] @ R[inside]) / chance[inside].sum()

    return [
        (i, y[:t], y[: t + 1], chance[i], V(y[: t + 1]) - V(y[:t])) for i, y in enumerate(said) for t in range(len(y))
    ]


def test_credit_of_the_outcome_and_of_an_exact_critic():
    lm = language.tree(3, 3)
    world = random_world(lm)
    rows = decisions(lm, world)
    seen, R = credit.Visited(lm, world), np.float64(world.rewards)
    want = weighted_correlation([R[i] for i, *_ in rows], [A for *_, A in rows], [p for *_, p, _ in rows])
    got = seen.agreement(R[:, None] + 0.0 * lm.mask)
    np.testing.assert_allclose(got["one"], want, rtol=1e-9)
    assert got["one"] < got["mean"] < 1
    np.testing.assert_allclose(list(seen.of_critic(seen.V, 0.0).values()), 1.0, rtol=1e-9)
    full = seen.of_critic(seen.V, 1.0)
    assert full["one"] < 0.9
    np.testing.assert_allclose(full["mean"], 1.0, rtol=1e-9)
    np.testing.assert_allclose(seen.of_critic(0 * seen.V, 1.0)["one"], want, rtol=1e-9)


def test_prefix_rollouts_in_closed_form_are_those_listed_one_by_one():
    lm = language.tree(3, 2)
    world = random_world(lm)
    said, _, chance, R = by_hand(lm, world)

    def rollouts(prefix):
        inside = [i for i, y in enumerate(said) if y[: len(prefix)] == prefix]
        return [(chance[i] / chance[inside].sum(), R[i]) for i in inside]

    x, y, weights = [], [], []
    for _, before, after, p, A in decisions(lm, world):
        for (q, paid), (r, instead) in itertools.product(rollouts(after), rollouts(before)):
            x.append(paid - instead)
            y.append(A)
            weights.append(p * q * r)
    got = credit.Visited(lm, world).of_prefix_rollouts(1)
    np.testing.assert_allclose(got["one"], weighted_correlation(x, y, weights), rtol=1e-9)
    np.testing.assert_allclose(got["mean"], 1.0, rtol=1e-9)


def test_credit_of_groups_is_that_of_a_plain_loop():
    lm = language.tree(3, 2)
    world = random_world(lm)
    rows, R = decisions(lm, world), np.float64(world.rewards)
    _, _, chance, _ = by_hand(lm, world)
    x = [R[i] - R[j] for i, *_ in rows for j in range(len(R))]
    y = [A for *_, A in rows for _ in R]
    weights = [p * q for *_, p, _ in rows for q in chance]
    got = credit.Visited(lm, world).of_groups(reinforce(), 2)
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
    assert "| MaxRL |" in within
    assert "\n[^maxrl]: " in text
    marked = [line for line in text.replace(within, "").splitlines() if line[:1] == "|" and "MaxRL" in line]
    assert len(marked) == 10  # five tables above, five weightings
    assert all("MaxRL[^maxrl]" in line for line in marked)


@pytest.mark.parametrize("weighting", list(estimators.WEIGHTINGS))
def test_printed_numbers_are_those_of_a_plain_loop(weighting):
    """Of leave one out over triples, whose samples come from the behaviour policy and whose loss has no ratio."""
    lm, length, found = language.tree(3, 3), np.float64(language.tree(3, 3).mask.sum(1)), everything(PAGE.read_text())
    places = worlds.moved(lm, estimators.Config().seed, estimators.Config().distances)
    triples = np.array(list(itertools.product(range(15), repeat=3)))
    for world, nats in zip(places, ("0", "0.01", "0.1", "0.5"), strict=True):
        _, score, chance, R = by_hand(lm, world)
        reference = by_hand(lm, world._replace(policy=world.reference))[2]
        truth = (chance * R) @ score
        regularised = (chance * (R - gradients.BETA * np.log(chance / reference))) @ score
        p = by_hand(lm, world._replace(policy=world.behaviour))[2][triples].prod(1)
        share = {
            "token_mean": 1 / np.repeat(length[triples].sum(1), 3).reshape(-1, 3),
            "seq_mean_token_mean": 1 / length[triples] / 3,
            "seq_mean_token_sum": np.ones(triples.shape) / 3,
            "seq_mean_token_sum_norm": np.ones(triples.shape) / 9,
        }[weighting]
        ahead = 1.5 * (R[triples] - R[triples].mean(1)[:, None])
        g = np.einsum("ij,ijk->ik", share * ahead, score[triples])
        mean, size = p @ g, np.linalg.norm(truth)
        scale = mean @ truth / size**2
        want = {
            "bias": np.linalg.norm(mean - truth) / size,
            "∇J": mean @ truth / size / np.linalg.norm(mean),
            "∇J_β": mean @ regularised / np.linalg.norm(regularised) / np.linalg.norm(mean),
            "var": p @ ((g - mean) ** 2).sum(1) / (scale * size) ** 2,
        }
        row = found[weighting]["REINFORCE, leave one out"]
        for what, number in want.items():
            np.testing.assert_allclose(float(row[f"{what}, {nats}"]), number, rtol=6e-3, atol=1e-8, err_msg=what)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_page_is_what_the_command_writes(tmp_path):
    assert estimators.main(estimators.Config(file=str(tmp_path / "page.md"))) == PAGE.read_text()
