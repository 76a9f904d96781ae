"""Where the steps of a completion end, and rewards of steps and rewards with a condition, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rewards import hostile
from rewards.test_score import COLUMNS, EOS, TRAJ, decode, rows_of
from rljax.algorithms import gdpo, grpo_process
from rljax.rewards.number import exact_number
from rljax.rewards.score import RewardError, StepScores, make_score
from rljax.rewards.steps import mark_step_ends
from rljax.rewards.worker import Result
from rljax.types import Trajectory

TOKENS = [b"", b"a", b"b", b"\n", b"\n\n", b".\n", b" ", b"Step", b" 2", b":", "\N{EURO SIGN}".encode()[:1], b"x\ny"]
_, A, B, LINE, TWO, STOP, SPACE, STEP, TWICE, COLON, EURO, CROSSED = range(len(TOKENS))


def ends_of(tokens, separator="\n", before=0, after=0):
    """Indices of the tokens at which steps end, of a row with columns of a prompt and of padding beside it."""
    actions = np.array([[A] * before + tokens + [LINE] * after])
    mask = np.array([[False] * before + [True] * len(tokens) + [False] * after])
    traj = Trajectory(inputs=actions, actions=actions, logp=np.zeros(mask.shape), mask=mask)
    found = mark_step_ends(traj, TOKENS, separator)
    assert not (found & ~mask).any()
    return (np.flatnonzero(found[0]) - before).tolist()


@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 3)])
@pytest.mark.parametrize(
    ("tokens", "separator", "ends"),
    [
        ([A, LINE, B, B, LINE, EOS], "\n", [1, 4]),  # EOS is no step
        ([A, LINE, B, EOS], "\n", [1, 3]),  # what follows the last separator is one
        ([A, B, EOS], "\n", [2]),  # no separator: one step
        ([A, LINE, LINE, SPACE, LINE, B, LINE], "\n", [1, 6]),  # white space alone is none
        ([LINE, A, LINE], "\n", [2]),
        ([A, TWO, B, STOP], "\n", [1, 3]),  # a token may hold more than the separator
        ([A, LINE, LINE, B, TWO, A, LINE, B], "\n\n", [2, 4, 7]),  # one separator in two tokens
        ([A, STEP, TWICE, COLON, B], "Step 2:", [3, 4]),
        ([A, CROSSED, B], "\n", [1, 2]),
        ([EOS], "\n", [0]),
        ([LINE, EOS], "\n", [1]),
        ([EURO, LINE], "\n", [1]),  # half a letter
        ([], "\n", []),
    ],
)
def test_where_steps_end(tokens, separator, ends, before, after):
    assert ends_of(tokens, separator, before, after) == ends


def test_a_separator_is_not_empty():
    with pytest.raises(ValueError, match="the separator of steps is empty; legal: a text"):
        ends_of([A], "")


# --------------------------------------------------------------------------------------------------- rewards of steps

ENDS = np.array([[0, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
STEPS = np.array([[9, 0.5, 9, 0.25, 9], [9, 9, 9, 0.75, 9], [np.nan, 9, 9, 9, 9], [9, 9, 9, 9, 9]])


def of_steps(traj, prompts):
    return StepScores(jnp.array(STEPS), jnp.array(ENDS))


def test_a_step_is_rewarded_where_it_ends():
    """Beside an outcome; ends outside of the mask are none; a step without a score leaves the row without a reward."""
    model_rewards = {"steps": of_steps}
    score = make_score({"right": exact_number}, decode, {"steps": 2}, model_rewards=model_rewards)
    traj = score(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(traj.scores, [[1, 0.25], [1, 0.75], [1, np.nan], [0, np.nan]])
    np.testing.assert_array_equal(traj.step_ends, ENDS & TRAJ.mask)
    want = [[0, 1, 0, 0.5 + 1, 0], [0, 0, 0, 1.5 + 1, 0], [np.nan, 0, 0, np.nan, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(traj.rewards, want)
    assert traj.rewards.dtype == np.float32
    alone = make_score({}, decode, model_rewards=model_rewards)(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(alone.rewards[:2], [[0, 0.5, 0, 0.25, 0], [0, 0, 0, 0.75, 0]])
    recorded = make_score({"right": exact_number}, decode, {"steps": 0}, model_rewards=model_rewards)
    np.testing.assert_array_equal(recorded(TRAJ, rows_of(COLUMNS)).rewards[:, 3], [1, 1, 1, 0])
    without = make_score({"right": exact_number}, decode)(TRAJ, rows_of(COLUMNS))
    assert without.step_ends is None


def test_process_grpo_learns_from_them():
    """Steps of 0.5 and 0.25 + 1 in the first row, of 0.75 in the second; a token has its step and the later ones."""
    score = make_score({"right": exact_number}, decode, model_rewards={"steps": of_steps})
    traj = score(TRAJ.replace(group=jnp.array([40, 40, 41, 41])), rows_of(COLUMNS))
    got = grpo_process().credit(jax.tree.map(jnp.asarray, traj), {}).advantages
    rewards = np.array([0.5, 1.25, 0.75])
    first, second, third = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    want = [[0, first + second, second, second, 0], [0, 0, 0, third, 0]]
    np.testing.assert_allclose(got[:2], want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- conditions


def fixed(*values):
    return lambda traj, prompts: [Result(None, x) if isinstance(x, str) else Result(x, "ok") for x in values]


def conditioned(conditions, **rewards):
    score = make_score({}, decode, model_rewards={n: fixed(*v) for n, v in rewards.items()}, conditions=conditions)
    return score(TRAJ, rows_of(COLUMNS))


def test_an_easy_reward_counts_where_the_hard_one_holds():
    """Rows: hard holds; does not; failed; does not apply. What the easy one says counts in the first alone."""
    traj = conditioned({"easy": "hard"}, hard=(1, 0, "timeout", "none"), easy=(0.5, 0.5, 0.5, 0.5))
    np.testing.assert_array_equal(traj.scores, [[1, 0.5], [0, 0], [np.nan, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(traj.rewards[:3, 3], [1.5, 0, np.nan])
    traj = conditioned({"easy": "hard"}, hard=(1, 0, -2, 0.1), easy=("timeout", "timeout", 0.5, "none"))
    np.testing.assert_array_equal(traj.scores, [[1, np.nan], [0, 0], [-2, 0], [np.float32(0.1), np.nan]])
    np.testing.assert_array_equal(traj.rewards[:3, 3], [np.nan, 0, -2])


def test_sub_goals_build_on_one_another():
    """The third counts where the second does, which counts where the first does."""
    goals = {"one": (1, 0, 1, 1), "two": (1, 1, 0, 1), "three": (1, 1, 1, 0.5)}
    traj = conditioned({"two": "one", "three": "two"}, **goals)
    np.testing.assert_array_equal(traj.scores, [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0.5]])


def test_steps_count_where_the_outcome_holds():
    def right(traj, prompts):
        return np.array([1.0, 0.0, 0.0, 0.0])

    score = make_score({}, decode, model_rewards={"right": right, "steps": of_steps}, conditions={"steps": "right"})
    traj = score(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(traj.rewards[:3], [[0, 0.5, 0, 0.25 + 1, 0], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(traj.scores[:, 1], [0.25, 0, 0, 0])


def test_gdpo_reads_the_conditioned_scores():
    """(1, 0.5), (0, 0): components of ±1/√2, with (0) sums √2, -√2, 0 of deviation √2."""
    traj = conditioned({"easy": "hard"}, hard=(1, 0, 0, 0), easy=(0.5, 0.9, 0, 0))
    got = gdpo().credit(jax.tree.map(jnp.asarray, traj.replace(group=jnp.array([0, 0, 1, 1]))), {})
    np.testing.assert_allclose(got.advantages[:3, 3], [1, -1, 0], atol=1e-5)


@pytest.mark.parametrize(
    "conditions", [{"easy": "absent"}, {"absent": "hard"}, {"easy": "easy"}, {"easy": "hard", "hard": "easy"}]
)
def test_conditions_that_cannot_be_resolved(conditions):
    with pytest.raises(ValueError, match=r"is above 0; legal: two rewards of hard, easy, the second"):
        conditioned(conditions, hard=(1, 1, 1, 1), easy=(1, 1, 1, 1))


def test_a_verifier_may_be_the_condition_of_a_model():
    score = make_score({"right": exact_number}, decode, {}, None, {"m": fixed(5, 5, 5, 5)}, {"m": "right"})
    np.testing.assert_array_equal(score(TRAJ, rows_of(COLUMNS)).scores, [[1, 5], [1, 5], [1, 5], [0, 0]])
    with pytest.raises(RewardError, match="no such rubric"):
        make_score({"raises": hostile.raises}, decode)(TRAJ, rows_of(COLUMNS))
