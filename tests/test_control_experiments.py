"""The recipes of classical control, as a user runs them, for a few steps."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from experiments import control, maze
from experiments.common import command_line
from experiments.control_methods import dqn, on_policy, tabular
from rljax.envs.cartpole import make_cartpole


def test_the_maze_is_drawn(tmp_path, capsys):
    reached = maze.main(maze.Config(steps=1500, seeds=4, epsilon=1.0, directory=str(tmp_path)))
    assert reached["distance"] < 0.1
    assert reached["optimal"] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"maze.svg", "exact.svg", "distance.svg", "report.html"}
    assert "9.00 (9.00)" in capsys.readouterr().out
    for path in tmp_path.glob("*.svg"):
        ET.parse(path)
        assert path.read_text() in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("algo", ["ppo", "dqn"])
def test_a_curve_and_frames_are_drawn(tmp_path, algo, capsys):
    steps = {"ppo": 4000, "dqn": 11_000}[algo]
    reached = control.main(control.Config(algo=algo, seeds=2, total_steps=steps, directory=str(tmp_path)))
    assert reached.keys() == {"median", "worst"}
    assert {path.name for path in tmp_path.iterdir()} == {"curve.svg", "frames.svg", "report.html"}
    assert "2 seeds" in (tmp_path / "curve.svg").read_text()
    assert "greedy return: median" in capsys.readouterr().out


def test_settings_of_the_command_line_win():
    sizes, hyper, _ = control.settings(control.Config(algo="ppo", env="acrobot", total_steps=1000, learning_rate=0.5))
    assert (sizes.total_steps, sizes.num_steps) == (1000, 256)
    assert float(hyper.learning_rate) == 0.5
    assert float(hyper.gamma) == np.float32(0.99)
    with pytest.raises(ValueError, match=r"no environment 'pong'; legal: acrobot, .*, gymnax:NAME"):
        control.make_env("pong")


def test_trpo_has_a_bound_and_no_learning_rate():
    _, hyper, _ = control.settings(control.Config(algo="trpo", env="maze", delta=0.02))
    assert float(hyper.delta) == np.float32(0.02)
    with pytest.raises(ValueError, match="trpo reads no learning_rate; legal: delta"):
        control.settings(control.Config(algo="trpo", learning_rate=0.1))
    with pytest.raises(ValueError, match="dqn reads no delta; legal: learning_rate"):
        control.settings(control.Config(algo="dqn", delta=0.1))


@pytest.mark.parametrize("algo", ["reinforce", "off_policy_pg"])
def test_whole_episodes_are_credited_undiscounted(algo):
    assert control.settings(control.Config(algo=algo, env="acrobot"))[0].num_steps == 500
    with pytest.raises(ValueError, match=f"{algo} reads no gamma; legal: learning_rate"):
        control.settings(control.Config(algo=algo, gamma=0.5))


def methods_of(module):
    return [value for value in vars(module).values() if isinstance(value, module.Method)]


def test_the_command_line_names_every_method(monkeypatch):
    """Each once: `make_train` is replaced by a function that returns the method it is given."""
    monkeypatch.setattr(on_policy, "make_train", lambda env, method, sizes: method)
    trainers = [trainer for trainer in control.TRAINERS.values() if trainer.make_train is not dqn.make_train]
    named = [trainer.make_train(make_cartpole(), on_policy.Sizes()) for trainer in trainers]
    assert len(trainers) == len(control.TRAINERS) - 1
    assert set(named) == set(methods_of(on_policy))
    assert len(named) == len(set(named))
    assert set(maze.METHODS.values()) == set(methods_of(tabular))


def test_every_algorithm_has_settings_for_an_environment_it_is_not_tuned_for():
    for algo in control.TRAINERS:
        sizes, hyper, _ = control.settings(control.Config(algo=algo, env="four_rooms"))
        expected = (dqn.Sizes, dqn.Hyperparams) if algo == "dqn" else (on_policy.Sizes, on_policy.Hyperparams)
        assert (type(sizes), type(hyper)) == expected


def test_a_method_without_a_ratio_makes_one_update_of_a_rollout():
    """V-trace on any environment; another number is refused."""
    for env in control.ENVS:
        sizes, hyper, _ = control.settings(control.Config(algo="vtrace", env=env))
        on_policy.vtrace_learner(sizes, hyper)
    for wrong in ({"epochs": 4}, {"minibatches": 8}):
        with pytest.raises(ValueError, match=r"right for one update of a rollout.*; legal: 1 x 1"):
            on_policy.vtrace_learner(sizes._replace(**wrong), hyper)


def test_greedy_episodes_last_as_long_as_the_environment_says():
    assert [control.max_episode_steps(control.make_env(name)) for name in ("pendulum", "maze", "catch")] == [
        200,
        50,
        500,
    ]


def test_a_run_too_short_to_end_an_episode_is_one_error():
    with pytest.raises(ValueError, match="no episode ended in this run: take more --total_steps"):
        control.binned_returns({"return": np.zeros(3), "episodes": np.zeros(3, int)})


def test_stretches_without_an_end_take_the_mean_before():
    curve = {"return": np.array([0.0, 2, 4, 0, 0, 6]), "episodes": np.array([0, 1, 3, 0, 0, 2])}
    assert control.binned_returns(curve, 6).tolist() == [2, 2, 4, 4, 4, 6]
    assert control.binned_returns(curve, 2).tolist() == [3.5, 6]


def test_a_goal_in_a_wall_is_one_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["maze.py", "--walls", "0", "2"])
    with pytest.raises(SystemExit):
        command_line.run(maze.Config, maze.main)
    assert "goal at (0, 2) is in a wall" in capsys.readouterr().out
