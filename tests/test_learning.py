"""Reinforcement learning raises eval accuracy. These runs are for the night; by day tests/test_benchmarks.py learns."""

import statistics

import pytest

from experiments import arithmetic_grpo
from experiments.arithmetic_controls import gain
from experiments.common import arithmetic
from experiments.common.settings import Batches, Optimizer


@pytest.mark.nightly
def test_grpo_learns_to_sort(tmp_path):
    """From one answer in ten right to most of them, on orders of digits never trained on."""
    cfg = arithmetic_grpo.Config(
        task="sortings",
        steps=16,
        batches=Batches(prompts=16, num_generations=8, micro_batches=1),
        optimizer=Optimizer(learning_rate=1e-3),
        sft_target=0.1,
        eval_prompts=256,
        eval_every=16,
        directory=str(tmp_path),
    )
    reached = arithmetic_grpo.main(cfg)
    assert reached["after"] > reached["before"] + 0.2


@pytest.mark.nightly
@pytest.mark.timeout(36_000)
def test_the_demo_learns_on_seeds_it_does_not_know(tmp_path):
    """Median at least 80 %, worst at least 65 %, from 20-50 % after the warm-up."""
    runs = [arithmetic_grpo.main(arithmetic_grpo.Config(seed=s, directory=f"{tmp_path}/{s}")) for s in range(101, 106)]
    assert all(0.2 <= run["before"] <= 0.5 for run in runs)
    after = [run["after"] for run in runs]
    assert statistics.median(after) >= 0.8
    assert min(after) >= 0.65


@pytest.mark.nightly
@pytest.mark.timeout(18_000)
@pytest.mark.parametrize("reward", ["random", "shuffled"])
def test_rewards_that_know_nothing_teach_nothing(tmp_path, reward):
    cfg = arithmetic_grpo.Config(reward=reward, directory=str(tmp_path))
    reached = arithmetic_grpo.main(cfg)
    change, half = gain(reached["before"], reached["after"], cfg.eval_prompts)
    assert change <= half


def pairs_of_numbers(prompts) -> set[tuple[str, str]]:
    """The two numbers of each addition, the smaller first."""
    return {tuple(sorted(row["prompt"][:5].split("+"))) for row in prompts.columns}


def test_training_and_eval_problems_share_no_pair_of_numbers():
    task = arithmetic.make_task("additions", eval_prompts=1024, seed=3)
    seen, unseen = (pairs_of_numbers(prompts) for prompts in (task.train_prompts, task.eval_prompts))
    assert seen
    assert unseen
    assert not seen & unseen
