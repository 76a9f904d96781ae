"""Laws of weights. The peers' aggregation modes are in tests/golden/estimation.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.ops import weights

T = 9
MODES = {
    "token-mean": jax.jit(weights.token_mean),
    "seq-mean-token-mean": jax.jit(weights.seq_mean_token_mean),
    "seq-mean-token-sum": jax.jit(weights.seq_mean_token_sum),
    "seq-mean-token-sum-norm": jax.jit(weights.seq_mean_token_sum_norm(float(T))),
    "prompt-mean": jax.jit(weights.prompt_mean),
}
GROUP = jnp.array([1007, -3, 1007, 8])  # the prompt of each of the four sequences


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


BY_MODE = pytest.mark.parametrize("mode", MODES)


def rows_and_packed():
    """Four sequences in rows of their own; the same ones as segments of two rows. The second has no decision."""
    draw = np.random.default_rng(0)
    lengths, terms = [4, 3, 5, 2], draw.normal(size=(4, T))
    mask = np.zeros((4, T), bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = draw.random(length) < 0.8
    mask[0, 0], mask[1] = True, False
    packed, segments, packed_terms = np.zeros((2, T), bool), np.zeros((2, T), int), np.zeros((2, T))
    group = np.full((2, T), 1007)
    for into, rows in enumerate([(0, 1), (2, 3)]):
        at = 0
        for number, row in enumerate(rows):
            take = slice(at, at + lengths[row])
            group[into, take] = GROUP[row]
            packed[into, take], segments[into, take] = mask[row, : lengths[row]], number + 1
            packed_terms[into, take] = terms[row, : lengths[row]]
            at = take.stop
    return (mask, terms), (packed, segments, group, packed_terms)


@BY_MODE
def test_packing_changes_no_sum(mode):
    (mask, terms), (packed, segments, group, packed_terms) = rows_and_packed()
    own = MODES[mode](jnp.asarray(mask), jnp.asarray(mask).astype(int), GROUP)
    together = MODES[mode](jnp.asarray(packed), jnp.asarray(segments), jnp.asarray(group))
    close((own * terms).sum(), (np.asarray(MODES[mode](jnp.asarray(mask), None, GROUP)) * terms).sum())
    close((together * packed_terms).sum(), (own * terms).sum())
    np.testing.assert_array_equal(np.asarray(together)[~packed], 0.0)


def test_sequence_lengths_count_decisions_of_the_segment():
    (_, _), (packed, segments, _, _) = rows_and_packed()
    want = [[(packed[b] & (segments[b] == segments[b, t])).sum() for t in range(T)] for b in range(2)]
    got = np.asarray(weights.sequence_lengths(jnp.asarray(packed), jnp.asarray(segments)))
    close(got[segments > 0], np.array(want)[segments > 0])


@BY_MODE
def test_rows_without_a_decision_weigh_nothing_and_divide_nothing(mode):
    (mask, _), _ = rows_and_packed()
    full = np.asarray(MODES[mode](jnp.asarray(mask), None, GROUP))
    np.testing.assert_array_equal(full[~mask], 0.0)
    close(np.delete(full, 1, axis=0), MODES[mode](jnp.asarray(np.delete(mask, 1, axis=0)), None, jnp.delete(GROUP, 1)))
    np.testing.assert_array_equal(MODES[mode](jnp.zeros((3, T), bool), None, GROUP[:3]), 0.0)


def test_weights_of_three_answers_by_hand():
    """Of 3, 1 and 0 tokens in rows of 9; the constant is 5."""
    mask = jnp.zeros((3, T), bool).at[0, 2:5].set(True).at[1, 4].set(True)
    first, second = np.zeros((3, T)), np.zeros((3, T))
    first[0, 2:5], second[1, 4] = 1.0, 1.0
    close(weights.token_mean(mask), first / 4 + second / 4)
    close(weights.seq_mean_token_mean(mask), first / 6 + second / 2)
    close(weights.seq_mean_token_sum(mask), first / 2 + second / 2)
    close(weights.seq_mean_token_sum_norm(5.0)(mask), first / 10 + second / 10)
    close(weights.over_all_rows(weights.seq_mean_token_mean)(mask), first / 9 + second / 3)


def test_every_prompt_weighs_the_same_however_many_tokens_it_has():
    """Prompts 4 (completions of 3 and 1 tokens), 9 (of 2) and 5 (none): 1/(2·4) and 1/(2·2) a token."""
    lengths = np.array([3, 2, 0, 1])
    mask = np.arange(T) < lengths[:, None]
    got = weights.prompt_mean(jnp.asarray(mask), None, jnp.array([4, 9, 5, 4]))
    close(got, mask * np.array([1 / 8, 1 / 4, 0, 1 / 8])[:, None])


def test_a_mean_over_prompts_needs_to_know_the_prompts():
    with pytest.raises(ValueError, match=r"Trajectory\.group"):
        weights.prompt_mean(jnp.ones((2, T), bool))
