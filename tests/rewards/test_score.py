"""From verifiers to `scores` and `rewards`: where they stand, when they are NaN, and what is told when they fail."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rewards import hostile
from rljax.rewards.format import matches
from rljax.rewards.number import exact_number
from rljax.rewards.pool import Pool
from rljax.rewards.score import RewardError, make_score
from rljax.types import PromptBatch, Trajectory, check_shapes

EOS = 0
COLUMNS = [{"answer": "12", "pattern": "x"}, {"answer": "3", "pattern": "x"}]


def decode(tokens):
    """Token i is the digit i - 1; EOS is special and vanishes."""
    return "".join(str(token - 1) for token in tokens if token != EOS)


def rows_of(columns) -> PromptBatch:
    P = len(columns)
    return PromptBatch(
        np.ones((P, 2), np.int32), np.ones((P, 2), bool), np.arange(40, 40 + P, dtype=np.int32), columns, P
    )


def traj_of(actions, mask, group) -> Trajectory:
    actions, mask = jnp.array(actions, jnp.int32), jnp.array(mask, bool)
    return Trajectory(
        inputs=actions, actions=actions, logp=jnp.zeros(mask.shape), mask=mask, group=jnp.array(group) + 40
    )


# Prompt, "12" EOS; "3" cut; "4" with an observation in between; nothing chosen.
TRAJ = traj_of(
    [[9, 2, 3, EOS, EOS], [9, 9, 9, 4, EOS], [4, 7, EOS, EOS, 8], [1, 1, 1, 1, 1]],
    [[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
    [0, 1, 1, 0],
)


def sees(completion, **columns):
    return len(columns)


def test_scores_and_rewards():
    score = make_score({"right": exact_number, "long": hostile.length}, decode, weights={"long": 0.25})
    traj = score(TRAJ, rows_of(COLUMNS))
    check_shapes(traj)
    assert score.names == ("right", "long")
    np.testing.assert_array_equal(traj.scores, [[1, 2], [1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(
        traj.rewards, [[0, 0, 0, 1.5, 0], [0, 0, 0, 1.25, 0], [0, 0, 0, 1.25, 0], [0, 0, 0, 0, 0]]
    )
    assert traj.scores.dtype == traj.rewards.dtype == np.float32
    assert TRAJ.rewards is None


@pytest.mark.parametrize("pad", [EOS, 1, 5])
def test_the_last_token_is_found_from_the_mask_whatever_the_ids(pad):
    want = make_score({"right": exact_number}, decode)(TRAJ, rows_of(COLUMNS))
    other = TRAJ.replace(actions=jnp.where(TRAJ.mask, TRAJ.actions, pad))
    got = make_score({"right": exact_number}, decode)(other, rows_of(COLUMNS))
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_array_equal(got.rewards, want.rewards)


def test_a_row_is_scored_alike_alone_and_in_company():
    score = make_score({"right": exact_number}, decode)
    whole = score(TRAJ, rows_of(COLUMNS))
    for b in range(4):
        alone = traj_of(TRAJ.actions[b : b + 1], TRAJ.mask[b : b + 1], TRAJ.group[b : b + 1] - 40)
        np.testing.assert_array_equal(score(alone, rows_of(COLUMNS)).rewards, whole.rewards[b : b + 1])


def test_none_is_left_out_and_a_row_without_a_verdict_is_nan():
    both = make_score({"twelve": hostile.only_twelve, "right": exact_number}, decode)(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(both.scores, [[1, 1], [np.nan, 1], [np.nan, 1], [0, 0]])
    np.testing.assert_array_equal(both.rewards[:, 3], [2, 1, 1, 0])
    alone = make_score({"twelve": hostile.only_twelve}, decode)(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(alone.rewards[:, 3], [1, np.nan, np.nan, 0])
    assert np.isnan(alone.rewards).sum() == 2


def test_a_failure_leaves_the_whole_row_without_a_reward():
    with Pool(workers=2) as pool:
        score = make_score({"fails": hostile.dies_on_three, "right": exact_number}, decode, pool=pool)
        traj = score(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(traj.scores, [[0.5, 1], [np.nan, 1], [np.nan, 1], [0.5, 0]])
    np.testing.assert_array_equal(traj.rewards[:, 3], [1.5, np.nan, np.nan, 0])
    assert np.isnan(traj.rewards).sum() == 2


def test_weight_zero_is_recorded_only():
    weights = {"fails": 0, "twelve": 0.0}
    with Pool(workers=2) as pool:
        verifiers = {"fails": hostile.dies_on_three, "twelve": hostile.only_twelve, "right": exact_number}
        traj = make_score(verifiers, decode, weights, pool)(TRAJ, rows_of(COLUMNS))
        alone = make_score({"twelve": hostile.only_twelve}, decode, {"twelve": 0})(TRAJ, rows_of(COLUMNS))
    np.testing.assert_array_equal(np.isnan(traj.scores).sum(0), [2, 2, 0])
    np.testing.assert_array_equal(traj.rewards[:, 3], [1, 1, 1, 0])
    np.testing.assert_array_equal(alone.rewards[:, 3], [np.nan, np.nan, np.nan, 0])


def test_the_pool_and_its_size_change_nothing():
    verifiers = {"twelve": hostile.only_twelve, "right": exact_number, "long": hostile.length}
    here = make_score(verifiers, decode)(TRAJ, rows_of(COLUMNS))
    for workers in (1, 2):
        with Pool(workers=workers) as pool:
            there = make_score(verifiers, decode, pool=pool)(TRAJ, rows_of(COLUMNS))
        np.testing.assert_array_equal(there.scores, here.scores)
        np.testing.assert_array_equal(there.rewards, here.rewards)


def test_verifiers_get_the_columns_they_name():
    def optional(completion, answer="0", other=7):
        return int(answer) + other

    def all_of(text, **columns):
        return "".join(sorted(columns)) == "answerpatterntexts"

    columns = [{"answer": "1", "pattern": "x", "texts": 1, "text": "the verifier's own name"}]
    verifiers = {"optional": optional, "all": all_of, "bound": functools.partial(matches, pattern="2")}
    traj = make_score(verifiers, decode)(traj_of([[3, EOS]], [[1, 1]], [0]), rows_of(columns))
    np.testing.assert_array_equal(traj.scores, [[8, 1, 1]])
    assert make_score({"sees": functools.partial(sees, answer=1)}, decode)(TRAJ, rows_of(COLUMNS)).scores[0, 0] == 2


def test_a_missing_column_is_named_with_those_that_exist():
    rows = rows_of([{"answer": "12"}, {"question": "?", "level": 1}])
    with pytest.raises(RewardError, match=r"exact_number asks for answer.*prompt 41.*question, level"):
        make_score({"right": exact_number}, decode)(TRAJ, rows)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("verifier", "words"),
    [
        (hostile.raises, "no such rubric"),
        (functools.partial(hostile.says, what="yes"), r"returned 'yes' \(str\)"),
        (functools.partial(hostile.says, what=float("nan")), r"returned nan"),
        (functools.partial(exact_number, answer="many"), "column 'answer' holds no number: 'many'"),
    ],
)
def test_a_verifier_at_fault_is_one_error(verifier, words, workers):
    with Pool() as pool, pytest.raises(RewardError, match=words) as caught:
        make_score({"v": verifier}, decode, pool=pool if workers else None)(TRAJ, rows_of(COLUMNS))
    name = getattr(verifier, "func", verifier).__name__
    for part in (f":{name} failed on prompt 40", "completion '12'", "Legal: a finite number, or None"):
        assert part in str(caught.value)


def test_what_make_score_refuses():
    with pytest.raises(ValueError, match=r"'lenght'.*right, long"):
        make_score({"right": exact_number, "long": hostile.length}, decode, {"lenght": 1.0})
    with pytest.raises(ValueError, match="nan"):
        make_score({"right": exact_number}, decode, {"right": float("nan")})
    with pytest.raises(ValueError, match="at least one"):
        make_score({}, decode)
    with pytest.raises(ValueError, match="first argument"):
        make_score({"none": lambda: 0.0}, decode)
    for group in (None, jnp.array([0, 1, 2, 0])):
        with pytest.raises(ValueError, match=r"number of each row's prompt, one of \[40, 41\]"):
            make_score({"right": exact_number}, decode)(TRAJ.replace(group=group), rows_of(COLUMNS))
