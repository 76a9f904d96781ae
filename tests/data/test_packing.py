"""Packed demonstrations: every one is there once, apart from the others, and teaches what it teaches in its own row."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.algorithms.sft import sft
from rljax.data.demonstrations import demonstrations
from rljax.data.examples import Example
from rljax.data.packing import pack_demonstrations, padding_fractions
from rljax.data.prompts import pad_left
from rljax.models import decoder, policy
from rljax.ops.weights import seq_mean_token_mean, token_mean
from rljax.train.objective import policy_objective
from rljax.types import PromptBatch, check_shapes

IDS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def examples(pairs):
    """From pairs (ids of the prompt, ids of the completion)."""
    return [Example(prompt, completion, [True] * len(completion), {}) for prompt, completion in pairs]


WIDTHS = st.sampled_from([12, 19, 30])  # each new shape compiles


def test_two_rows_by_hand():
    """Lengths 3, 4, 5 in rows of 8: 5 and 3, then 4."""
    traj = pack_demonstrations(examples([([1], [2, 3]), ([4, 5, 6], [7]), ([8, 9], [10, 11, 12])]), 8, pad=99)
    check_shapes(traj)
    assert traj.inputs.tolist() == [[8, 9, 10, 11, 12, 1, 2], [4, 5, 6, 7, 99, 99, 99]]
    assert traj.actions.tolist() == [[9, 10, 11, 12, 1, 2, 3], [5, 6, 7, 99, 99, 99, 99]]
    assert traj.mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert traj.segments.tolist() == [[1, 1, 1, 1, 0, 2, 2], [1, 1, 1, 0, 0, 0, 0]]
    assert traj.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 0, 0]]
    assert np.unique(traj.temperature).tolist() == [1.0]
    assert traj.group is None


def test_only_tokens_of_the_mask_are_decisions():
    """A conversation of two turns: what the user says in between is context."""
    turns = Example([1, 2], [3, 4, 5, 6], [True, False, False, True], {})
    traj = pack_demonstrations([turns], 7)
    assert traj.mask.astype(int).tolist() == [[0, 1, 0, 0, 1, 0]]
    assert traj.segments.tolist() == [[1, 1, 1, 1, 1, 0]]


def test_first_token_after_a_segment_is_nobodys_target():
    """Without prompts a mask of the answers alone would let one demonstration predict the next one's start."""
    traj = pack_demonstrations(examples([([], [1, 2, 3]), ([], [4, 5])]), 5)
    assert traj.mask.astype(int).tolist() == [[1, 1, 0, 1]]
    assert traj.actions[0, 2] == 4


@settings(max_examples=20)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=12), WIDTHS)
def test_every_demonstration_is_there_once_and_whole(rows, width):
    traj = pack_demonstrations(examples(rows), width)
    assert traj.inputs.shape[1] == width - 1
    found = []
    for ids, actions, mask, segments in zip(traj.inputs, traj.actions, traj.mask, traj.segments, strict=True):
        assert sorted(set(np.asarray(segments).tolist()) - {0}) == list(range(1, np.max(segments) + 1))
        for number in range(1, np.max(segments) + 1):
            inside = np.asarray(segments) == number
            (columns,) = np.nonzero(inside)
            assert columns.tolist() == list(range(columns[0], columns[-1] + 1))
            whole = [int(ids[columns[0]]), *np.asarray(actions)[inside].tolist()]
            answer = np.asarray(actions)[inside & np.asarray(mask)].tolist()
            found.append((whole[: len(whole) - len(answer)], answer))
    assert sorted(found) == sorted(rows)
    assert int(traj.mask.sum()) == sum(len(answer) for _, answer in rows)


@settings(max_examples=20)
@given(st.lists(st.tuples(IDS, IDS), min_size=2, max_size=12), WIDTHS)
def test_at_most_one_row_is_less_than_half_full(rows, width):
    """First fit opens a row only where no other has room."""
    traj, (_, after) = pack_demonstrations(examples(rows), width), padding_fractions(examples(rows), width)
    whole = np.zeros(len(traj.segments), int)
    for row, segments in enumerate(np.asarray(traj.segments)):
        whole[row] = (segments > 0).sum() + segments.max()  # each segment has one token more than decisions inside
    assert (whole * 2 < width).sum() <= 1
    np.testing.assert_allclose(after, 1 - whole.sum() / (len(whole) * width), atol=1e-12)


def test_padding_before_and_after():
    """12 tokens: in three rows as wide as the longest, 5; in one of 12; in two of 8."""
    before, after = padding_fractions(examples([([1], [2, 3]), ([4, 5], [7, 8]), ([8, 9], [10, 11, 12])]), 12)
    np.testing.assert_allclose((before, after), (3 / 15, 0.0), atol=1e-12)
    before, after = padding_fractions(examples([([1], [2, 3]), ([4, 5], [7, 8]), ([8, 9], [10, 11, 12])]), 8)
    np.testing.assert_allclose((before, after), (3 / 15, 4 / 16), atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([([1], [2]), ([1, 2, 3], [4, 5])], "demonstration 1 has 5 tokens; a row holds from 1 to 4"),
        ([([1], [2]), ([], [])], "demonstration 1 has 0 tokens"),
        ([], "there are no demonstrations"),
    ],
)
def test_demonstrations_that_cannot_be_packed(rows, message):
    for function in (pack_demonstrations, padding_fractions):
        with pytest.raises(ValueError, match=message):
            function(examples(rows), 4)


@pytest.mark.parametrize("weights", [token_mean, seq_mean_token_mean])
def test_sft_learns_the_same_from_packed_and_unpacked_demonstrations(weights):
    config = decoder.DecoderConfig(13, 12, 2, 2, 1, 6, 32)
    random = np.random.default_rng(0)
    sizes = [(3, 5), (1, 2), (4, 7), (2, 1), (5, 3), (1, 9)]
    rows = [tuple(random.integers(0, 13, size).tolist() for size in pair) for pair in sizes]
    tokens, mask = pad_left([prompt for prompt, _ in rows], 5, 0)
    alone = demonstrations(
        PromptBatch(tokens, mask, np.arange(6, dtype=np.int32), [{}] * 6, 6), [a for _, a in rows], 9
    )
    together = pack_demonstrations(examples(rows), 16)
    assert together.mask.shape[0] < 6

    algorithm = sft(weights)
    objective = policy_objective(policy.make_policy(config), algorithm)
    params = policy.init(config, jax.random.key(0))

    def learn(traj):
        batch = objective.prepare(params, {}, algorithm.credit(traj, {}), jax.random.key(1))
        return jax.jit(jax.value_and_grad(lambda p: objective.loss(p, {}, batch)[0]))(params)

    (loss, gradient), (packed_loss, packed_gradient) = learn(alone), learn(together)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), packed_gradient, gradient)
