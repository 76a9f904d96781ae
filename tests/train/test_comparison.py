import json

import numpy as np
import pytest
from scipy import stats

from rljax.train.comparison import (
    compare_runs,
    group_runs,
    label_groups,
    line_of,
    mean_and_interval,
    read_run,
    write_comparison,
)
from rljax.train.log import Log


def make_run(directory, metrics, **config):
    with Log(directory, total_steps=len(metrics)) as log:
        for step, values in enumerate(metrics):
            log.write(step, values)
    facts = {"experiment": "grpo", "git": "abc", "jax": "0.10.2"}
    (directory / "config.json").write_text(json.dumps({"config": {"directory": directory.name, **config}, **facts}))
    return read_run(directory)


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one setting, the last cut short, and one of another."""
    settings = [("a0", 0, 0.0), ("a1", 1, 0.0), ("b0", 0, 0.1), ("a2", 2, 0.0)]
    made = []
    for name, seed, kl_coef in settings:
        steps = 3 if name == "a2" else 4
        metrics = [{"reward": seed + step, "seconds": 2.0 + seed, "sample_seconds": 1.0} for step in range(steps)]
        nested = {"kl_coef": kl_coef, "rate": 0.5}
        made.append(make_run(tmp_path / name, metrics, seed=seed, nested=nested))
    return made


def test_runs_that_differ_in_seed_and_directory_are_a_group(runs):
    groups = group_runs(runs)
    assert [[run.name for run in group] for group in groups] == [["a0", "a1", "a2"], ["b0"]]
    assert label_groups(groups) == ["nested.kl_coef 0.0", "nested.kl_coef 0.1"]
    assert label_groups(groups[:1]) == ["a0"]


def test_seeds_that_begin_from_checkpoints_of_their_own_are_a_group(tmp_path):
    """As tables/compare.py runs them: a supervised checkpoint for each seed."""
    runs = [make_run(tmp_path / f"a{i}", [{"reward": 1.0}], seed=i, sft_directory=f"sft-seed{i}") for i in range(2)]
    assert [len(group) for group in group_runs(runs)] == [2]
    assert compare_runs(runs)["differences"]["rows"] == []


def test_another_experiment_is_another_group(runs):
    other = runs[0]._replace(experiment="ppo", name="c0")
    groups = group_runs([runs[0], other])
    assert len(groups) == 2
    assert label_groups(groups) == ["grpo", "ppo"]


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=(5, 7))
    mean, low, high = mean_and_interval(values)
    want = stats.t.interval(0.95, 4, loc=values.mean(axis=0), scale=stats.sem(values, axis=0))
    np.testing.assert_allclose([low, high], want)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    assert mean_and_interval(values[:1])[1:] == (None, None)


def test_a_line_is_the_mean_where_all_runs_have_a_value():
    one, other = ([0, 1, 2, 3], [1.0, None, 3.0, 4.0]), ([0, 1, 2], [3.0, 5.0, 5.0])
    line = line_of([one, other])
    assert (line["steps"], line["values"], line["extent"]) == ([0, 2], [2.0, 4.0], [1.0, 5.0])
    half = stats.t.ppf(0.975, 1) * 1.0  # s = √2, n = 2
    np.testing.assert_allclose(line["low"], [2 - half, 4 - half], rtol=1e-5)
    alone = line_of([one])
    assert (alone["steps"], alone["values"]) == ([0, 2, 3], [1.0, 3.0, 4.0])
    assert "low" not in alone
    assert line_of([one, None]) is None
    assert line_of([([0], [1.0]), ([1], [1.0])]) is None


def test_long_lines_are_smoothed_run_by_run():
    draw = np.random.default_rng(0)
    columns = [(list(range(2000)), (seed + draw.normal(size=2000)).tolist()) for seed in range(3)]
    line = line_of(columns)
    assert len(line["steps"]) <= 400
    assert np.std(line["values"]) < 0.2
    assert np.all(np.array(line["low"]) < line["values"])


def test_what_the_page_says(runs):
    data = compare_runs(runs)
    assert data["title"]["run"] == "4 runs in 2 lines"
    assert data["steps"] == [0, 3]
    assert [group["seeds"] for group in data["groups"]] == ["0, 1, 2", "0"]
    reward = data["curves"][0]["series"][0]
    assert [line["group"] for line in reward["lines"]] == [0, 1]
    assert reward["lines"][0]["values"] == [1.0, 2.0, 3.0]  # the shortest run ends it
    (name, cells) = data["results"][0]
    assert (name, cells[0]["mean"], cells[1]) == (
        "reward",
        pytest.approx(11 / 3, abs=1e-5),
        {"mean": 3.0, "low": None, "high": None},
    )
    assert data["differences"]["rows"] == [["nested.kl_coef", "", ["0.0", "0.1"]]]
    times = {row[0]: row[1:] for row in data["time"]["rows"]}
    assert times["a step, median"] == ["seconds", [3.0, 2.0]]
    assert times["share of sample"] == ["share", [pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3, abs=1e-5), 0.5]]
    assert ["jax", "", ["0.10.2", "0.10.2"]] in data["environment"]["rows"]
    assert data["memory"]["rows"] == []


def test_a_metric_that_the_first_run_lacks_is_among_the_last_values(tmp_path):
    without = make_run(tmp_path / "without", [{"reward": 0.5}], kl_coef=0.0)
    with_kl = make_run(tmp_path / "with_kl", [{"reward": 0.25, "kl": 3.0}], kl_coef=0.1)
    alone = {"low": None, "high": None}
    for order in ((0, 1), (1, 0)):
        results = dict(compare_runs([(without, with_kl)[i] for i in order])["results"])
        assert list(results) == ["reward", "kl"]
        assert [results["kl"][order.index(i)] for i in (0, 1)] == [{"mean": None, **alone}, {"mean": 3.0, **alone}]


def test_alarms_name_their_run(tmp_path):
    sick = make_run(tmp_path / "sick", [{"truncated": 0.9}], seed=0)
    well = make_run(tmp_path / "well", [{"truncated": 0.1}], seed=1)
    assert [(found["run"], found["metric"]) for found in compare_runs([well, sick])["alarms"]] == [
        ("sick", "truncated")
    ]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing has no metrics.jsonl with a step"):
        write_comparison([tmp_path / "nothing"], tmp_path / "page.html")
