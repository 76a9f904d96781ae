"""The page of reward against KL, from made-up runs."""

from experiments.tables import rlhf_frontier


def result(method, seed, kl, reward, path=()):
    before = {"reward": -1.0, "error": 0.3, "kl": 0.0}
    after = {"reward": reward, "error": 0.4, "kl": kl}
    return {"method": method, "seed": seed, "git": "abc", "before": before, "after": after, "path": list(path)}


RESULTS = [
    result("dpo", 0, 8.0, 1.0),
    result("ppo", 1, 4.0, 2.0, [(0.0, -1.0), (2.0, 1.0)]),
    result("ppo", 0, 3.0, 1.5),
]


def test_the_page_counts_gains_in_standard_errors():
    page = rlhf_frontier.results_page(RESULTS, "rlhf.svg")
    rows = [line for line in page.splitlines() if line.startswith(("| ppo", "| dpo"))]
    assert rows == [
        "| ppo | 0 | -1.00 ± 0.30 | 1.50 ± 0.40 | 5.0 | 3.0 |",
        "| ppo | 1 | -1.00 ± 0.30 | 2.00 ± 0.40 | 6.0 | 4.0 |",
        "| dpo | 0 | -1.00 ± 0.30 | 1.00 ± 0.40 | 4.0 | 8.0 |",
    ]
    assert "(rlhf.svg)" in page


def test_the_picture_has_a_dot_for_each_run():
    picture = rlhf_frontier.picture(RESULTS)
    assert picture.count("<circle") == 3
    # 520 pixels are a KL of 8.4 and 300 pixels the rewards from -1 to 2
    assert f'cx="{60 + 520 * 4 / 8.4:.1f}" cy="30.0"' in picture
