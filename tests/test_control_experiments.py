"""The recipes of classical control, as a user runs them, for a few steps."""

import re
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

from experiments import control, maze
from experiments.common import command_line
from experiments.control_methods import dqn, on_policy, tabular
from rljax.envs.cartpole import make_cartpole


def test_the_maze_is_drawn(tmp_path, capsys):
    """(1, 3) is a wall and (0, 3) behind the goal: episodes tell nothing of them, and they are not compared."""
    places = {"columns": 4, "start": (0, 0), "walls": ((1, 3),)}
    reached = maze.main(maze.Config(steps=1500, seeds=4, epsilon=1.0, directory=str(tmp_path), **places))
    assert reached["distance"] < 0.1
    assert reached["optimal"] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"maze.svg", "exact.svg", "distance.svg", "report.html"}
    shown = capsys.readouterr().out
    assert "9.00 (9.00)" in shown
    assert not re.search(r"\([01], 3\)", shown)
    for path in tmp_path.glob("*.svg"):
        ET.parse(path)
        assert path.read_text() in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("algo", ["ppo", "dqn"])
def test_a_curve_and_frames_are_drawn(tmp_path, algo, capsys):
    steps = {"ppo": 4000, "dqn": 11_000}[algo]
    reached = control.main(control.Config(algo=algo, seeds=2, total_steps=steps, directory=str(tmp_path)))
    assert reached.keys() == {"median", "worst"}
    assert "clip_range" in (tmp_path / "report.html").read_text() or algo == "dqn"
    assert "damping" not in (tmp_path / "report.html").read_text()  # TRPO's
    assert {path.name for path in tmp_path.iterdir()} == {"curve.svg", "frames.svg", "report.html"}
    assert "2 seeds" in (tmp_path / "curve.svg").read_text()
    assert "greedy return: median" in capsys.readouterr().out


def settings(algo, env="cartpole", **flags):
    return control.settings(control.Config(algo=algo, env=env, **flags), control.make_env(env))


def test_settings_of_the_command_line_win():
    sizes, hyper, _ = settings("ppo", "acrobot", total_steps=1000, learning_rate=0.5)
    assert (sizes.total_steps, sizes.num_steps) == (1000, 256)
    assert float(hyper.learning_rate) == 0.5
    assert float(hyper.gamma) == np.float32(0.99)
    with pytest.raises(ValueError, match=r"no environment 'pong'; legal: acrobot, .*, gymnax:NAME"):
        control.make_env("pong")


def test_trpo_has_a_bound_and_no_learning_rate():
    _, hyper, _ = settings("trpo", "maze", delta=0.02)
    assert float(hyper.delta) == np.float32(0.02)
    with pytest.raises(ValueError, match="trpo reads no learning_rate; legal: gamma, delta"):
        settings("trpo", learning_rate=0.1)
    with pytest.raises(ValueError, match="dqn reads no delta; legal: learning_rate"):
        settings("dqn", delta=0.1)


@pytest.mark.parametrize("algo", ["reinforce", "off_policy_pg"])
def test_whole_episodes_are_credited_undiscounted(algo):
    assert not {"gamma", "lam"} & set(control.TRAINERS[algo].reads)
    with pytest.raises(ValueError, match=f"{algo} reads no gamma; legal: learning_rate"):
        settings(algo, gamma=0.5)


@pytest.mark.parametrize("algo", [name for name, trainer in control.TRAINERS.items() if trainer.whole_episodes])
def test_whole_episodes_are_as_long_as_the_environments(algo):
    for env, steps in {"maze": 50, "pendulum": 200, "acrobot": 500}.items():
        assert settings(algo, env)[0].num_steps == steps
    assert settings(algo, "catch")[0].num_steps == 9  # as tuned


class Recording:
    """Sizes that note which of them are read."""

    def __init__(self, sizes):
        self.sizes, self.names = sizes, set()

    def __getattr__(self, name):
        self.names |= {name} if name in self.sizes._fields else {"total_steps", "num_envs", "num_steps"}
        return getattr(self.sizes, name)


@pytest.mark.parametrize(
    "algo", [pytest.param(name, marks=pytest.mark.nightly if name != "trpo" else ()) for name in control.TRAINERS]
)
def test_a_method_reads_the_settings_that_the_report_shows(algo):
    """Sizes as they are asked for, hyperparameters as the program depends on them."""
    trainer, env = control.TRAINERS[algo], control.make_env("maze")
    sizes, hyper, network = settings(algo, "maze")
    key = jax.random.key(0)
    recording = Recording(sizes)
    train = trainer.make_train(env, recording)
    jaxpr = jax.make_jaxpr(train)(trainer.init_params(env, key, **network), key, hyper).jaxpr
    used = set(map(id, jaxpr.outvars))  # by what comes out: Adam's -1 * learning_rate is computed for no step too
    for equation in reversed(jaxpr.eqns):
        if used & set(map(id, equation.outvars)):
            used |= set(map(id, equation.invars))
    arguments = zip(hyper._fields, jaxpr.invars[-len(hyper) :], strict=True)
    read = recording.names | {name for name, x in arguments if id(x) in used}
    assert read == set(trainer.reads)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_envs": 0}, "num_envs = 0; legal: above 0"),
        ({"total_steps": -1}, "total_steps = -1; legal: above 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0; legal: above 0"),
        ({"gamma": 1.5}, "gamma = 1.5; legal: 0 to 1"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(flags, message):
    for algo in ("dqn", "ppo"):
        with pytest.raises(ValueError, match=message):
            settings(algo, **flags)


@pytest.mark.parametrize(
    "flags",
    [{"steps": 0}, {"epsilon": 1.5}, {"slip": 2.0}, {"alpha": 0.0}, {"power": -1.0}, {"gamma": 0.0}, {"seeds": 0}],
    ids=str,
)
def test_numbers_that_no_run_in_a_maze_can_have_are_refused(flags):
    ((name, value),) = flags.items()
    with pytest.raises(ValueError, match=f"^{name} = {value}; legal: "):
        maze.main(maze.Config(**flags))


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
        sizes, hyper, _ = settings(algo, "four_rooms")
        expected = (dqn.Sizes, dqn.Hyperparams) if algo == "dqn" else (on_policy.Sizes, on_policy.Hyperparams)
        assert (type(sizes), type(hyper)) == expected


def test_a_method_without_a_ratio_makes_one_update_of_a_rollout():
    """V-trace on any environment, by an actor that lags: its ratios are not all 1. Another number is refused."""
    for env in control.ENVS:
        sizes, hyper, _ = settings("vtrace", env)
        assert sizes.actor_lag > 1
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
