"""Running pass rates: what a draw leaves out by them, as a pure function of seed, cursor and state."""

import numpy as np
import pytest

from experiments.common.difficulty import initial_rates, lowest_rate, make_next_prompts
from experiments.common.settings import PromptData
from rljax.data.difficulty import initial_pass_rates, is_left_out, update_pass_rates
from rljax.data.prompts import Prompts, shuffled_indices
from rljax.types import TrainState

ROWS = [{"n": i} for i in range(10)]
PROMPTS = Prompts(ROWS, [[1 + i] for i in range(10)], 4, seed=5)


def test_a_rate_is_the_first_share_and_then_the_last_counts_half():
    rates = initial_pass_rates(4)
    rates = update_pass_rates(rates, [2, 0], [0, 0], np.array([1.0, np.nan]))
    rates = update_pass_rates(rates, [2], [3], np.array([0.5]))
    assert rates.rate.tolist() == [0, 0, 0.75, 0]
    assert rates.epoch.tolist() == [-1, -1, 3, -1]  # what was not judged is not known


def test_what_is_left_out():
    rates = update_pass_rates(initial_pass_rates(4), [0, 1, 2], [0, 0, 0], np.array([0.0, 0.5, 1.0]))
    indices = np.arange(4)
    for epoch, expected in [(0, [True, False, True, False]), (2, [True, False, True, False]), (3, [False] * 4)]:
        found = is_left_out(rates, indices, np.full(4, epoch), lowest=0.1, highest=0.9, skip_epochs=2)
        assert found.tolist() == expected


def test_draws_pass_over_what_is_left_out():
    """The oracle walks through the shuffled order one by one."""
    bad = {1, 4, 7}
    cursor = 3
    for _ in range(5):
        drawn = PROMPTS.draw_unless(cursor, 6, lambda indices, epochs: np.isin(indices, list(bad)))
        expected = []
        number = cursor
        while len(expected) < 6:
            if int(shuffled_indices(10, 5, number, 1)[0]) not in bad:
                expected.append(number)
            number += 1
        assert drawn.number.tolist() == expected
        assert drawn.cursor == number
        assert drawn.columns == PROMPTS.columns_of(drawn.number)
        assert not bad & {row["n"] for row in drawn.columns}
        cursor = drawn.cursor


def test_a_batch_is_filled_where_too_much_is_left_out():
    drawn = PROMPTS.draw_unless(0, 4, lambda indices, epochs: indices != 3)
    assert len(drawn.number) == 4
    assert 3 in [row["n"] for row in drawn.columns]
    everything = PROMPTS.draw_unless(7, 4, lambda indices, epochs: np.full(len(indices), True))
    assert everything.number.tolist() == PROMPTS.draw(7, 4).number.tolist()


def test_without_a_filter_draws_are_the_plain_ones():
    state = TrainState(0, {}, (), None, cursor=4)
    drawn = make_next_prompts(PromptData(), PROMPTS)(state, 0, 5)
    assert drawn.number.tolist() == PROMPTS.draw(4, 5).number.tolist()
    assert initial_rates(PromptData(), PROMPTS, carry_over=2) is None


def test_a_curriculum_begins_with_easy_prompts():
    options = PromptData(curriculum_steps=10, min_pass_rate=0.1)
    assert [lowest_rate(options, step) for step in (0, 5, 10, 99)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    rates = update_pass_rates(initial_pass_rates(10), range(5), [0] * 5, np.array([0.0, 0.2, 0.4, 0.6, 1.0]))
    state = TrainState(0, {}, (), None, cursor=0, extra=rates._asdict())
    draw = make_next_prompts(options, PROMPTS)
    assert {row["n"] for row in draw(state, 0, 7).columns} == {3, 4, 5, 6, 7, 8, 9}  # easy, or not known yet
    assert {row["n"] for row in draw(state, 10, 9).columns} == {1, 2, 3, 4, 5, 6, 7, 8, 9}


def test_a_curriculum_leaves_prompts_that_may_be_drawn():
    """Of rates of at most 0.4 the upper half at first."""
    options = PromptData(curriculum_steps=4, max_pass_rate=0.4)
    assert [lowest_rate(options, step) for step in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0])
    assert lowest_rate(PromptData(curriculum_steps=4, min_pass_rate=0.8), 0) == 0.8
    rates = update_pass_rates(initial_pass_rates(10), range(10), [0] * 10, np.arange(10) / 10)
    state = TrainState(0, {}, (), None, cursor=0, extra=rates._asdict())
    assert {row["n"] for row in make_next_prompts(options, PROMPTS)(state, 0, 3).columns} == {2, 3, 4}


@pytest.mark.parametrize(
    ("options", "carry_over", "message"),
    [
        ({"min_pass_rate": 0.8, "max_pass_rate": 0.2}, 0, "legal: 0 <= min <= max <= 1"),
        ({"curriculum_steps": -1}, 0, "steps from 0 on"),
        ({"max_pass_rate": 0.9}, 2, "carry_over = 2 and prompts left out by their pass rate"),
    ],
)
def test_settings_that_cannot_be(options, carry_over, message):
    with pytest.raises(ValueError, match=message):
        initial_rates(PromptData(**options), PROMPTS, carry_over)
