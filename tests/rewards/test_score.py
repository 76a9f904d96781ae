"""From verifiers to `scores` and `rewards`: where they stand, when they are NaN, and what is told when they fail."""

import functools
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from rewards import hostile
from rljax.rewards.format import matches
from rljax.rewards.number import exact_number
from rljax.rewards.pool import Pool
from rljax.rewards.score import RewardError, RowText, decode_rows, make_score
from rljax.rewards.worker import Result
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
    with pytest.raises(RewardError, match=r"asks for answer.*prompt 41.*question, level"):
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
    for part in ("v failed on prompt 40", "completion '12'", "Legal: a finite number, or None"):
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


# ------------------------------------------------------------------------------------------------------- model rewards


def test_a_model_reward_enters_as_a_verifier_does():
    """Row 1 is not judged by the model, row 2 not by its server; the verifier's part alone would be a lower reward."""
    seen = []

    def model(traj, prompts):
        seen.append((traj, prompts))
        return jnp.array([0.5, np.nan, -2.0, 4.0])

    def server(traj, prompts):
        return [Result(1.0, "ok"), Result(3.0, "ok"), Result(None, "timeout"), Result(None, "none")]

    rows = rows_of(COLUMNS)
    model_rewards = {"model": model, "server": server}
    score = make_score({"right": exact_number}, decode, {"model": 10, "server": 100}, model_rewards=model_rewards)
    traj = score(TRAJ, rows)
    assert score.names == ("right", "model", "server")
    assert seen[0][0] is TRAJ
    assert seen[0][1] is rows
    np.testing.assert_array_equal(traj.scores, [[1, 0.5, 1], [1, np.nan, 3], [1, -2, np.nan], [0, 4, np.nan]])
    np.testing.assert_array_equal(traj.reward_weights, [[1, 10, 100]] * 4)
    np.testing.assert_array_equal(traj.rewards[:, 3], [1 + 5 + 100, np.nan, np.nan, 0])
    recorded = make_score({"right": exact_number}, decode, dict.fromkeys(model_rewards, 0), model_rewards=model_rewards)
    np.testing.assert_array_equal(recorded(TRAJ, rows).rewards[:, 3], [1, 1, 1, 0])
    alone = make_score({}, decode, model_rewards={"model": model})(TRAJ, rows)
    np.testing.assert_array_equal(alone.rewards[:, 3], [0.5, np.nan, -2, 0])


def test_servers_are_asked_side_by_side_while_the_verifiers_judge():
    """Each waits until all three of them were asked."""
    all_asked = threading.Barrier(3, timeout=60)

    def verifier(completion):
        if not all_asked.broken and not met:
            met.append(all_asked.wait())
        return 1.0

    def server(value):
        def reward(traj, prompts):
            all_asked.wait()
            return [Result(value, "ok"), Result(None, "timeout"), Result(None, "unreachable"), Result(value, "ok")]

        return reward

    met = []
    servers = {"one": server(2.0), "two": server(3.0)}
    model = {"model": lambda traj, prompts: np.zeros(4)}
    score = make_score({"v": verifier}, decode, {"two": 0}, model_rewards=model, servers=servers)
    traj = score(TRAJ, rows_of(COLUMNS))
    assert score.names == ("v", "model", "one", "two")
    kept, lost = [1, 0, 2, 3], [1, 0, np.nan, np.nan]
    np.testing.assert_array_equal(traj.scores, [kept, lost, lost, kept])
    np.testing.assert_array_equal(traj.rewards[:3, 3], [3, np.nan, np.nan])

    def broken(traj, prompts):
        raise RewardError("no such column")

    with pytest.raises(RewardError, match="no such column"):
        make_score({}, decode, servers={"broken": broken})(TRAJ, rows_of(COLUMNS))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (np.zeros(3), "it returned 3 numbers for 4 rows"),
        (np.zeros((4, 2)), "it returned 8 numbers for 4 rows"),
        (np.array([0, np.inf, 0, 0]), "it returned inf"),
        ([Result(1.0, "ok")], "it returned 1 numbers for 4 rows"),
        ([Result(1.0, "ok")] * 3 + [Result(None, "error", "no rubric")], "no rubric"),
    ],
)
def test_a_model_reward_at_fault_is_one_error(returned, words):
    with pytest.raises(RewardError, match=f"the model reward m failed: {words}\nLegal: a finite number, or NaN"):
        make_score({}, decode, model_rewards={"m": lambda traj, prompts: returned})(TRAJ, rows_of(COLUMNS))


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"one name; legal: names that differ, here \('right', 'right'\)"):
        make_score({"right": exact_number}, decode, model_rewards={"right": exact_number})


def test_rows_as_text():
    """Observations in between belong to neither; padding on the left is no prompt; cut is not ended."""
    traj = TRAJ.replace(
        inputs=jnp.array([[5, 9, 2, 3, EOS], [7, 8, 9, 9, 4], [6, 4, 7, 1, EOS], [2, 2, 2, 2, 2]]),
        segments=jnp.array([[1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        terminated=jnp.zeros((4, 5), bool).at[0, 3].set(True).at[1, 4].set(True),
    )
    want = [("48", "12", True), ("88", "3", False), ("5", "3", False), ("11111", "", False)]
    assert decode_rows(traj, decode) == [RowText(*row) for row in want]


def test_a_run_stops_where_too_many_rows_were_not_judged():
    """Two of four failed; what does not apply is no failure, and what is recorded only stops nothing."""
    results = [Result(1.0, "ok"), Result(None, "timeout", "no answer"), Result(None, "none"), Result(None, "invalid")]
    lines = []

    def score(max_failed, weight=1.0):
        model_rewards = {"m": lambda traj, prompts: results}
        made = make_score({}, decode, {"m": weight}, None, model_rewards, max_failed=max_failed, report=lines.append)
        return made(TRAJ, rows_of(COLUMNS))

    line = "m did not judge 2 of 4 completions: timeout 1, invalid 1; the first: no answer"
    with pytest.raises(RewardError, match=rf"^{line}\. Legal: at most 49% of a rollout$"):
        score(0.49)
    assert lines == []
    np.testing.assert_array_equal(score(0.5).scores[:, 0], [1, np.nan, np.nan, np.nan])
    score(0.0, weight=0.0)
    assert lines == [line, line]


def test_verifiers_that_die_stop_a_run_too():
    with Pool(workers=2) as pool:
        score = make_score({"fails": hostile.dies_on_three}, decode, pool=pool, max_failed=0.25)
        with pytest.raises(RewardError, match=r"^fails did not judge 2 of 4 completions: died 2"):
            score(TRAJ, rows_of(COLUMNS))
