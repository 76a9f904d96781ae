"""The comparison of algorithms: which runs it plans, what a recorded result depends on, and the page it writes."""

import dataclasses

from experiments.arithmetic_grpo import ALGORITHMS
from experiments.common import train
from experiments.tables import compare, results_page

RECORD = {"task": "sortings", "steps": 40, "git": "abc+", "jax": "0.10.2"}


def result(algorithm, seed, before, after, seconds):
    curve = [[0, before], [40, after]]
    facts = {"algorithm": algorithm, "seed": seed, "before": before, "after": after, "seconds": seconds}
    return {**RECORD, **facts, "curve": curve}


def test_every_algorithm_runs_with_every_seed():
    cfg = compare.Config(algorithms=("grpo", "ppo"), seeds=(3, 4))
    planned = [(run.task, run.algorithm, run.seed) for run in compare.planned_runs(cfg)]
    assert planned == [("sortings", name, seed) for seed in (3, 4) for name in ("grpo", "ppo")]


def recorded(run, **changed):
    """A record of the run, as if it had been made with these settings changed."""
    run = dataclasses.replace(run, **changed)
    return {"algorithm": compare.method_of(run), "settings": compare.settings_of(run)}


def test_a_result_is_that_of_a_run_with_its_settings():
    run = dataclasses.replace(compare.SORTING, algorithm="grpo")
    assert compare.is_of(recorded(run), run)
    assert not compare.is_of(recorded(run, steps=41), run)
    assert not compare.is_of(recorded(run, seed=1), run)
    assert not compare.is_of(recorded(run, algorithm="gspo"), run)
    assert not compare.is_of(recorded(run, batches=dataclasses.replace(run.batches, prompts=16)), run)
    older = recorded(run)
    del older["settings"]["save_every"]
    assert compare.is_of(older, run), "a setting that is newer than the record"


def test_the_page_orders_algorithms_by_the_median_of_the_seeds_that_all_have_run():
    results = [
        result("grpo", 0, 0.25, 0.9, 40.2),
        result("ppo", 0, 0.25, 0.8, 50.0),
        result("grpo", 1, 0.125, 0.7, 41.0),
        result("ppo", 1, 0.125, 0.95, 49.0),
        result("rloo", 1, 0.125, 0.7, 39.0),
    ]
    page = results_page.results_page(results, "results", "what is compared")
    assert "40 steps; eval accuracy after the warm-up, by seed: 0.250, 0.125." in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table == [
        "| algorithm | seed 0 | seed 1 | seeds | median of seeds 1 | less grpo | longest run, s |",
        "|---|---|---|---|---|---|---|",
        "| ppo | 0.800 | 0.950 | 2 | 0.950 | +0.075 (-2.149 to +2.299) | 50 |",
        "| grpo | 0.900 | 0.700 | 2 | 0.700 |  | 41 |",
        "| rloo |  | 0.700 | 1 | 0.700 | +0.000 | 39 |",
    ]
    assert "The order says nothing yet: 3 of 3 algorithms have fewer than 3 seeds.\n\n| algorithm" in page
    assert "(results/sortings-1.svg)" in page
    assert page.endswith("Commits and jax of the runs: abc; 0.10.2.\n")


def test_with_three_seeds_each_the_order_stands():
    rows = [result(name, seed, 0.25, 0.5, 1.0) for name in ("grpo", "ppo") for seed in range(3)]
    assert "says nothing" not in results_page.results_page(rows, "results", "")
    assert "Of 1 differences from grpo, 0 lie above 0 with their whole interval, and 0 below." in (
        results_page.results_page(rows, "results", "")
    )
    better = [row | {"after": row["after"] + 0.1 * (row["algorithm"] == "ppo")} for row in rows]
    assert "Of 1 differences from grpo, 1 lie above 0" in results_page.results_page(better, "results", "")
    assert "1 of 2 algorithms" in results_page.results_page(rows[:-1], "results", "")


def test_a_picture_shows_five_algorithms_the_best_first():
    rows = [result(f"a{i}", seed, 0.0, 0.1 * i, 1.0) for i in range(7) for seed in (0, 1)]
    pictures = results_page.pictures(rows)
    assert list(pictures) == ["sortings-1.svg", "sortings-2.svg"]
    shown = [[f"a{i}" for i in range(7) if f">a{i}<" in picture] for picture in pictures.values()]
    assert shown == [["a2", "a3", "a4", "a5", "a6"], ["a0", "a1"]]


def test_an_interrupted_comparison_reads_back_what_is_finished(tmp_path, monkeypatch):
    measured = []

    def measure(run, directory):
        measured.append(run.algorithm)
        return result(run.algorithm, run.seed, 0.25, 0.5, 1.0)

    monkeypatch.setattr(compare, "measure", measure)
    cfg = compare.Config(
        ("grpo",),
        (0,),
        directory=str(tmp_path),
        records=str(tmp_path / "runs.jsonl"),
        out=str(tmp_path / "page.md"),
    )
    compare.main(cfg)
    results = compare.main(dataclasses.replace(cfg, algorithms=("grpo", "gspo")))
    assert measured == ["grpo", "gspo"]
    assert [record["algorithm"] for record in results] == ["grpo", "gspo"]

    # Of three that are wanted two are finished: their page, and no run.
    wanted = dataclasses.replace(cfg, algorithms=("grpo", "gspo", "online_dpo"), finished_only=True)
    assert [record["algorithm"] for record in compare.main(wanted)] == ["grpo", "gspo"]
    assert "| gspo |" in (tmp_path / "page.md").read_text()
    assert compare.main(cfg)[0]["settings"] == compare.settings_of(compare.planned_runs(cfg)[0])
    assert measured == ["grpo", "gspo"]


def test_online_dpo_samples_as_much_and_updates_as_often_as_methods_that_select():
    dpo = compare.run_of(compare.SORTING, "online_dpo", 3)
    grpo = compare.run_of(compare.SORTING, "grpo", 3)
    assert dpo.batches.prompts == grpo.batches.prompts * grpo.batches.oversample
    shared = ("num_generations", "epochs", "minibatches")
    assert [getattr(dpo.batches, name) for name in shared] == [getattr(grpo.batches, name) for name in shared]
    for name in ("task", "seed", "steps", "optimizer", "sft_target", "eval_prompts", "eval_every"):
        assert getattr(dpo, name) == getattr(grpo, name), name
    assert not compare.is_of(recorded(dpo, loss="ipo"), dpo)


def test_a_result_does_not_depend_on_the_mesh():
    run = compare.run_of(compare.SORTING, "grpo", 0)
    assert compare.is_of(recorded(run, mesh=dataclasses.replace(run.mesh, tensor=2)), run)


def test_every_planned_run_has_sizes_that_its_method_takes():
    for run in compare.planned_runs(compare.Config(seeds=(0,))):
        if compare.method_of(run) != "online_dpo":
            train.check_algorithm(ALGORITHMS[run.algorithm](), run.batches, run.algorithm)
