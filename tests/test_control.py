"""Control is learned, at the targets of the field: median and worst of five seeds, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import norm

from experiments import control
from experiments.control_methods import dqn, on_policy
from experiments.control_methods.on_policy import Hyperparams, Sizes
from rljax.envs.cartpole import make_cartpole
from rljax.envs.pendulum import make_pendulum
from rljax.envs.tabular import TabularMDP, tabular_env
from rljax.models import mlp
from rljax.rollouts.unroll import draw_noise, reset_envs, unroll
from rljax.types import TrainState, Trajectory

SEEDS = range(5)
OPTIMIZED = {"xla_backend_optimization_level": 3}  # these programs run for long, while most tests only compile theirs
few_or_five_seeds = pytest.mark.parametrize(
    "seeds", [SEEDS[:2], pytest.param(SEEDS, marks=pytest.mark.nightly)], ids=len
)


def runs(train, env, hyper, network=None, seeds=SEEDS):
    """For each seed: return over the last tenth of training, mean greedy return of 64 new episodes; the curves.

    train: (params, key, hyper) -> (params, curve).
    """
    num_traces = 0

    def counted(params, key, hyper):
        nonlocal num_traces
        num_traces += 1
        return train(params, key, hyper)

    compiled = jax.jit(counted, compiler_options=OPTIMIZED)
    play = jax.jit(on_policy.make_play(env), static_argnums=2)
    hyper = jax.tree.map(jnp.float32, hyper)
    last = []
    greedy = []
    curves = []
    for seed in seeds:
        key = jax.random.key(seed)
        params = on_policy.init_params(env, key, **(network or {}))
        params, curve = compiled(params, jax.random.fold_in(key, 1), hyper)
        last.append(float(on_policy.final_return(curve)))
        greedy.append(float(play(params, jax.random.fold_in(key, 2), 64).rewards.sum(axis=1).mean()))
        assert all(bool(jnp.isfinite(x).all()) for x in curve.values())
        curves.append(curve)
    assert num_traces == 1
    return np.array(last), np.array(greedy), curves


def tuned_runs(algo, name, seeds=SEEDS):
    """At the settings of `experiments/control.py`."""
    env = control.make_env(name)
    sizes, hyper, network = control.TUNED[algo, name]
    return runs(control.TRAINERS[algo].make_train(env, sizes), env, hyper, network, seeds)


def runs_of(method, env, sizes, hyper, seeds=SEEDS):
    return runs(on_policy.make_train(env, method, sizes), env, hyper, seeds=seeds)


def deep_runs(sizes, hyper, seeds) -> list[float]:
    """Of each seed of DQN on CartPole: return over the last tenth of training."""
    env = make_cartpole()
    hyper = jax.tree.map(jnp.float32, hyper)
    train = jax.jit(dqn.make_train(env, sizes), compiler_options=OPTIMIZED)
    returns = []
    for key in map(jax.random.key, seeds):
        _, curve = train(dqn.init_params(env, key), jax.random.fold_in(key, 1), hyper)
        returns.append(float(on_policy.final_return(curve)))
    return returns


@pytest.mark.parametrize(
    "algo", ["reinforce_baseline", *(pytest.param(f"reinforce{x}", marks=pytest.mark.nightly) for x in ("", "_to_go"))]
)
def test_reinforce_learns_to_catch(algo):
    last, greedy, _ = tuned_runs(algo, "catch")
    assert last.min() >= 0.9
    assert greedy.min() == 1.0


@pytest.mark.nightly
@pytest.mark.parametrize("algo", ["off_policy_pg", "vtrace"])
def test_a_policy_that_lags_behind_teaches_too(algo):
    """Rollouts are by the policy of up to three rollouts ago."""
    last, *_ = tuned_runs(algo, "catch")
    assert np.median(last) >= 0.9
    assert last.min() >= 0.7


@pytest.mark.nightly
def test_vpg_balances_the_pole():
    _, greedy, _ = tuned_runs("vpg", "cartpole")
    assert np.median(greedy) >= 475
    assert greedy.min() >= 400


@few_or_five_seeds
def test_ppo_balances_the_pole(seeds):
    """Four passes in 4 minibatches, at a rate of 1e-3 that stays."""
    sizes = Sizes(150_000, value_clip=None, anneal_learning_rate=False)
    _, greedy, _ = runs_of(on_policy.PPO, make_cartpole(), sizes, Hyperparams(1e-3), seeds)
    assert np.median(greedy) >= 475
    assert greedy.min() >= 400  # the worst hangs on rounding: 500 and 471 were seen with two sets of XLA's flags


@pytest.mark.nightly
@pytest.mark.parametrize("algo", ["ppo", "ppo_penalty"])
def test_ppo_balances_the_pole_as_tuned(algo):
    env = make_cartpole()
    sizes, hyper, _ = control.TUNED["ppo", "cartpole"]
    _, greedy, _ = runs(control.TRAINERS[algo].make_train(env, sizes), env, hyper)
    assert np.median(greedy) >= 495
    assert greedy.min() >= 475


@pytest.mark.parametrize("continuous", [False, True])
def test_the_divergence_of_two_actors_in_both_directions(continuous):
    """KL(p ‖ q) against E_p (log p - log q), summed over actions or over draws of a Gaussian."""
    old, new = (mlp.init(jax.random.key(n), 3, 2, 8, continuous) for n in range(2))
    if continuous:
        new["actor"]["log_std"] += 0.3
    new["actor"]["layers"][-1]["w"] *= 200
    seen = jax.random.normal(jax.random.key(2), (2, 4, 3))
    blank = jnp.zeros((2, 4))
    traj = Trajectory(seen, blank, blank, blank == 0, dist=mlp.distribution(old, seen))
    for direction, (p, q) in {"old_new": (old, new), "new_old": (new, old)}.items():
        got = mlp.make_mlp_divergence(direction)(new, old, {}, traj)
        if continuous:
            draws, spread = 40_000, 0.1
            (m, s), (n, u) = mlp.distribution(p, seen), mlp.distribution(q, seen)
            x = np.asarray(m) + np.asarray(s) * np.random.default_rng(0).normal(size=(draws, *m.shape))
            want = (norm.logpdf(x, m, s) - norm.logpdf(x, n, u)).sum(-1).mean(0)
        else:
            a, b = (log_softmax(mlp.distribution(x, seen), -1) for x in (p, q))
            want, spread = (np.exp(a) * (a - b)).sum(-1), 1e-5
        np.testing.assert_allclose(got, want, atol=spread)
        assert got.max() > 0.1


TRUSTED = control.TUNED["trpo", "cartpole"].hyper


def within_delta(curves, delta):
    """Of all updates of all seeds the mean KL is within its bound; at least 95 % of the line searches succeed."""
    kl, accepted = (np.stack([curve[name] for curve in curves]) for name in ("kl_step", "accepted"))
    assert kl.max() <= np.float32(delta)
    assert kl[accepted == 1].min() > 0
    assert accepted.mean() >= 0.95


def test_the_kl_of_a_step_is_that_of_the_policies_before_and_after():
    env, sizes = make_cartpole(), Sizes(num_envs=8, num_steps=32, minibatches=1)
    params, key = on_policy.init_params(env, jax.random.key(0)), jax.random.key(1)
    learner = on_policy.trpo_learner(sizes, TRUSTED)

    @jax.jit
    def learn(params):
        _, traj = unroll(env, mlp.act, params, draw_noise(env, key, 8, 32), reset_envs(env, key, 8))
        traj = mlp.annotate(params, traj)
        state = TrainState(jnp.int32(0), params, learner.init_opt_state(params), key, {}, 0)
        state, metrics = learner.learn(state, learner.algorithm.credit(traj, {}))
        return traj.inputs, state.params, metrics

    seen, after, metrics = learn(params)
    old, new = (np.float64(log_softmax(mlp.distribution(x, seen), -1)) for x in (params, after))
    kl = (np.exp(old) * (old - new)).sum(-1).mean()
    np.testing.assert_allclose(metrics["kl_step"], kl, rtol=1e-3)
    assert 1e-4 < kl <= TRUSTED.delta


@pytest.mark.nightly
def test_trpo_balances_the_pole_within_its_bound():
    _, greedy, curves = tuned_runs("trpo", "cartpole")
    within_delta(curves, 0.01)
    assert np.median(greedy) >= 490
    assert greedy.min() >= 450


@pytest.mark.nightly
def test_trpo_swings_acrobot_up():
    _, greedy, curves = tuned_runs("trpo", "acrobot")
    within_delta(curves, 0.01)
    assert np.median(greedy) >= -92
    assert greedy.min() >= -100


@pytest.mark.nightly
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
def test_trpo_swings_the_pendulum_within_either_bound(direction):
    """A Gaussian policy; both bounds hold at a delta where the directions differ."""
    hyper = Hyperparams(lam=0.97, gamma=0.95, delta=0.05)
    _, _, curves = runs_of(on_policy.TRPO, make_pendulum(), Sizes(20_480, kl_direction=direction), hyper)
    within_delta(curves, hyper.delta)


@pytest.mark.parametrize(("as_terminal", "value"), [(False, 10.0), (True, 1 / (1 - 0.9 * 0.9))])
def test_a_time_limit_is_no_end(as_terminal, value):
    """One state that pays 1 for ever, cut every 10 steps: V = 1/(1 - γ) = 10; TD(0), the cut an end, finds 5.26."""
    forever = TabularMDP(jnp.ones((1, 1, 1)), jnp.ones((1, 1)), 0.9)
    env = tabular_env(forever, max_steps=10)
    if as_terminal:

        def step(key, state, action, params, env_step=env.step):
            out = env_step(key, state, action, params)
            return out._replace(terminated=out.truncated, truncated=out.terminated)

        env = env._replace(step=step)
    sizes = Sizes(16 * 20 * 150, num_envs=16, num_steps=20, epochs=20, minibatches=1)
    train = jax.jit(on_policy.make_train(env, on_policy.VPG, sizes))
    hyper = jax.tree.map(
        jnp.float32, Hyperparams(critic_learning_rate=1e-2, gamma=0.9, lam=0.0, entropy_coefficient=0.0)
    )
    params, _ = train(on_policy.init_params(env, jax.random.key(0), 8), jax.random.key(1), hyper)
    assert abs(float(mlp.values_of(params, jnp.ones((1, 1)))[0]) - value) < 0.1


@pytest.mark.nightly
def test_ppo_at_purejaxrls_settings_is_as_good():
    """4 x 128, 500,000 steps (CleanRL 490)."""
    last, *_ = runs_of(on_policy.PPO, make_cartpole(), Sizes(500_000, num_envs=4), Hyperparams(2.5e-4))
    assert np.median(last) >= 488
    assert last.min() >= 440


@pytest.mark.nightly
def test_ppo_swings_acrobot_up():
    _, greedy, _ = tuned_runs("ppo", "acrobot")
    assert np.median(greedy) >= -92
    assert greedy.min() >= -100


@pytest.mark.nightly
def test_ppo_swings_the_pendulum_up():
    """The published tuned ones reach -172 after 100,000 steps (rl-baselines3-zoo, gSDE)."""
    _, greedy, _ = tuned_runs("ppo", "pendulum")
    assert np.median(greedy) >= -180
    assert greedy.min() >= -250


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_ppo_plays_breakout():
    """MinAtar's: return 10 within 300,000 of 1,000,000 steps; skipped without gymnax.

    17 runs ended at 14.3 to 36.4, median 25.2; ten of PureJaxRL's script on gymnax 1.0.1 at 14.4 to 27.8, median 22.3.
    """
    pytest.importorskip("gymnax")
    last, _, curves = tuned_runs("ppo", "gymnax:Breakout-MinAtar")
    for curve in curves:
        assert curve["return"][: 300_000 // (64 * 64)].max() >= 10
    assert np.median(last) >= 20


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_dqn_at_purejaxrls_settings_is_as_good():
    """10 environments, 500,000 steps, ε 0.05 at the end (CleanRL 488.7)."""
    last = deep_runs(dqn.Sizes(), dqn.Hyperparams(), SEEDS)
    assert np.median(last) >= 488
    assert min(last) >= 450


@pytest.mark.nightly
@few_or_five_seeds
def test_dqn_balances_the_pole_in_50000_steps(seeds):
    """The settings of rl-baselines3-zoo but for its wider network: bursts of 128 updates every 256 steps."""
    sizes = dqn.Sizes(
        total_steps=50_000,
        num_envs=8,
        train_frequency=256,
        gradient_steps=128,
        learning_starts=1000,
        target_frequency=256,
        buffer_size=51_200,
        batch_size=64,
    )
    last = deep_runs(sizes, dqn.Hyperparams(2.3e-3, 0.99, 0.04, 0.16), seeds)
    assert np.median(last) >= 200  # a random policy earns 22; medians of 294 and above 300 were seen, by XLA's flags
    assert min(last) >= 100


def test_bad_sizes_are_refused():
    for num_envs in (0, 4, 16):
        with pytest.raises(ValueError, match=f"num_envs = {num_envs}; legal: 1, 2, 5, 10, the divisors of train_freq"):
            dqn.make_train(make_cartpole(), dqn.Sizes(num_envs=num_envs))
    with pytest.raises(ValueError, match="target_frequency = 15 must be a multiple of 10"):
        dqn.make_train(make_cartpole(), dqn.Sizes(target_frequency=15))
    with pytest.raises(ValueError, match="finitely many actions"):
        dqn.init_params(make_pendulum(), jax.random.key(0))
    with pytest.raises(ValueError, match=r"n_step = 2; legal: at most train_frequency / num_envs = 1"):
        dqn.make_train(make_cartpole(), dqn.Sizes(n_step=2))
    with pytest.raises(ValueError, match="total_steps = 9000; legal: more than learning_starts = 10000"):
        dqn.make_train(make_cartpole(), dqn.Sizes(9000))
    with pytest.raises(ValueError, match="legal: at least 16 x 128 = 2048"):
        on_policy.make_train(make_cartpole(), on_policy.PPO, Sizes(1000))
