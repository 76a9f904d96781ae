"""The next-token shift, and the shape check."""

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.types import Batch, Trajectory, check_shapes, trajectory_of_tokens

# Padding on the left; on the right; two packed segments and padding between them; no padding; nothing but padding.
TOKENS = np.array([[0, 0, 5, 6, 7, 8], [5, 6, 7, 0, 0, 0], [1, 2, 0, 3, 4, 5], [1, 2, 3, 4, 5, 6], [0] * 6])
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 2, 2, 2], [1, 1, 1, 2, 2, 2], [0] * 6])
CHOSEN = np.array([[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1], [0] * 6], bool)


def trajectory(**fields):
    return trajectory_of_tokens(TOKENS, SEGMENTS, CHOSEN, -np.arange(30.0).reshape(5, 6), **fields)


def test_inside_a_segment_what_is_chosen_is_the_next_input():
    traj = trajectory()
    for b, row in enumerate(np.asarray(traj.segments)):
        for t in np.flatnonzero(row):
            assert traj.actions[b, t] == TOKENS[b, t + 1]
            assert traj.inputs[b, t] == TOKENS[b, t]
            if t + 1 < 5 and row[t] == row[t + 1]:
                assert traj.actions[b, t] == traj.inputs[b, t + 1]


def test_a_column_belongs_to_a_segment_where_its_input_and_its_action_do():
    want = [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 2, 2], [1, 1, 0, 2, 2], [0] * 5]
    np.testing.assert_array_equal(trajectory().segments, want)


def test_positions_count_from_zero_in_each_segment():
    want = [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [0, 1, 0, 0, 1], [0, 1, 2, 0, 1], [0] * 5]
    np.testing.assert_array_equal(trajectory().positions, want)


def test_the_mask_marks_chosen_tokens_but_never_padding_nor_the_first_of_a_segment():
    want = [[0, 0, 0, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 1, 0, 1, 1], [0] * 5]
    np.testing.assert_array_equal(trajectory().mask, np.array(want, bool))


def test_facts_about_tokens_shift_with_them_and_facts_about_rows_stay():
    facts = np.arange(30.0).reshape(5, 6)
    traj = trajectory(rewards=facts, group=np.arange(5), scores=np.ones((5, 2)), temperature=jnp.asarray(facts))
    np.testing.assert_array_equal(traj.logp, -facts[:, 1:])
    np.testing.assert_array_equal(traj.rewards, facts[:, 1:])
    np.testing.assert_array_equal(traj.temperature, facts[:, 1:])
    np.testing.assert_array_equal(traj.group, np.arange(5))
    assert traj.scores.shape == (5, 2)


def test_check_accepts_every_field_in_its_own_shape():
    B, T = 2, 3
    cells = {name: np.zeros((B, T)) for name in ("logp", "mask", "rewards", "final_values", "version", "teacher_logp")}
    traj = Trajectory(
        inputs=np.zeros((B, T, 4)),
        actions=np.zeros((B, T, 2)),
        values=np.zeros((B, T + 1)),
        scores=np.zeros((B, 5)),
        group=np.zeros(B),
        baseline=np.zeros(B),
        routing=np.zeros((B, T, 2)),
        dist={"anything": np.zeros(1)},
        **cells,
    )
    check_shapes(traj)
    check_shapes(Batch(traj=traj, advantages=np.zeros((B, T)), mask=np.zeros((B, T), bool), coefficients={"kl": 0.1}))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("logp", (5, 6)),
        ("rewards", (5,)),
        ("values", (5, 5)),
        ("group", (4,)),
        ("scores", (4, 2)),
        ("segments", (4, 5)),
    ],
)
def test_check_names_a_field_of_another_shape(field, shape):
    with pytest.raises(ValueError, match=rf"Trajectory\.{field} has shape .*; with a mask of \(5, 5\)"):
        check_shapes(trajectory().replace(**{field: np.zeros(shape)}))


@pytest.mark.parametrize("field", ["advantages", "returns", "weight", "mask"])
def test_check_names_a_field_of_the_batch(field):
    fine = Batch(traj=trajectory(), advantages=np.zeros((5, 5)), mask=np.zeros((5, 5), bool))
    check_shapes(fine)
    with pytest.raises(ValueError, match=rf"Batch\.{field}"):
        check_shapes(fine.replace(**{field: np.zeros((5, 4))}))
