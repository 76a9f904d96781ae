"""Comparisons with errors, and the page about them."""

import pytest

from experiments.tables import annotator_noise

ROWS = [{"prompt": f"{i}", "chosen": "better", "rejected": "worse", "ended": [True, False]} for i in range(10_000)]


def test_a_share_of_the_comparisons_is_turned_round():
    assert annotator_noise.with_errors(ROWS, 0.0, 0) == ROWS
    turned = annotator_noise.with_errors(ROWS, 0.3, 0)
    assert turned == annotator_noise.with_errors(ROWS, 0.3, 0) != annotator_noise.with_errors(ROWS, 0.3, 1)
    errors = sum(row["chosen"] == "worse" for row in turned)
    assert abs(errors - 3000) < 5 * (10_000 * 0.3 * 0.7) ** 0.5
    assert all(row["ended"][0] == (row["chosen"] == "better") for row in turned)
    assert all({row["chosen"], row["rejected"]} == {"better", "worse"} for row in turned)


def test_what_is_learned_of_the_rule():
    follows = 0.9
    agreement = follows * 0.8 + (1 - follows) * 0.2
    assert annotator_noise.learned(agreement, 0.2) == pytest.approx(follows)
    assert annotator_noise.learned(0.8, 0.2) == pytest.approx(1.0)  # the limit


def test_the_page():
    facts = {"eval_accuracy_error": 0.02, "git": "abc"}
    results = [{"noise": 0.2, "seed": seed, "eval_accuracy": 0.6 + 0.1 * seed, **facts} for seed in (0, 1)]
    page = annotator_noise.results_page(results, wanted=15)
    assert "2 of 15 runs are done." in page
    assert "| 0.2 | 0.800 | 0.600, 0.700 | 0.650 | 0.750 |" in page


def test_noise_of_one_half_is_refused():
    with pytest.raises(ValueError, match=r"legal: from 0 to less than 0.5"):
        annotator_noise.main(annotator_noise.Config("model", noise=(0.5,)))
