"""The scripts of classical control, as a user runs them, on a few steps."""

import xml.etree.ElementTree as ET
from typing import get_args, get_type_hints

import numpy as np
import options
import pytest

import control
import maze
from classical import on_policy


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
    reached = control.main(control.Config(algo=algo, seeds=2, steps=steps, directory=str(tmp_path)))
    assert reached.keys() == {"median", "worst"}
    assert {path.name for path in tmp_path.iterdir()} == {"curve.svg", "frames.svg", "report.html"}
    assert "2 seeds" in (tmp_path / "curve.svg").read_text()
    assert "greedy return: median" in capsys.readouterr().out


def test_settings_of_the_command_line_win():
    sizes, hyper, _ = control.settings(control.Config(algo="ppo", env="acrobot", steps=1000, learning_rate=0.5))
    assert (sizes.steps, sizes.length) == (1000, 256)
    assert float(hyper.learning_rate) == 0.5
    assert float(hyper.gamma) == np.float32(0.99)
    with pytest.raises(ValueError, match=r"no environment 'pong'; legal: acrobot, .*, gymnax:NAME"):
        control.make_env("pong")


def test_trpo_has_a_bound_and_no_learning_rate():
    _, hyper, _ = control.settings(control.Config(algo="trpo", env="maze", delta=0.02))
    assert float(hyper.delta) == np.float32(0.02)
    with pytest.raises(ValueError, match="trpo has no learning_rate; legal: delta"):
        control.settings(control.Config(algo="trpo", learning_rate=0.1))
    with pytest.raises(ValueError, match="dqn has no delta; legal: learning_rate"):
        control.settings(control.Config(algo="dqn", delta=0.1))


@pytest.mark.parametrize("algo", ["reinforce", "off_policy_pg"])
def test_whole_episodes_are_credited_undiscounted(algo):
    assert control.settings(control.Config(algo=algo, env="acrobot"))[0].length == 500
    with pytest.raises(ValueError, match="reads no gamma"):
        control.settings(control.Config(algo=algo, gamma=0.5))


def test_the_command_line_names_every_method():
    assert set(get_args(get_type_hints(control.Config)["algo"])) == {"dqn", *on_policy.METHODS}


def test_greedy_episodes_last_as_long_as_the_environment_says():
    assert [control.limit_of(control.make_env(name)) for name in ("pendulum", "maze", "catch")] == [200, 50, 500]


def test_a_run_too_short_to_end_an_episode_is_one_error():
    with pytest.raises(ValueError, match="no episode ended in this run: take more --steps"):
        control.binned({"return": np.zeros(3), "episodes": np.zeros(3, int)})


def test_stretches_without_an_end_take_the_mean_before():
    curve = {"return": np.array([0.0, 2, 4, 0, 0, 6]), "episodes": np.array([0, 1, 3, 0, 0, 2])}
    assert control.binned(curve, 6).tolist() == [2, 2, 4, 4, 4, 6]
    assert control.binned(curve, 2).tolist() == [3.5, 6]


def test_a_goal_in_a_wall_is_one_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["maze.py", "--walls", "0", "2"])
    with pytest.raises(SystemExit):
        options.run(maze.Config, maze.main)
    assert "goal at (0, 2) is in a wall" in capsys.readouterr().out
