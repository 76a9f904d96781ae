"""Q-learning, SARSA, expected SARSA and double Q-learning on tables, each run one compiled function.

    Q(s, a) += α_t · error        α_t = alpha / N(s, a)^power

power 0 is a fixed step size, power 1 with alpha 1 the average of all targets. N counts the updates of an entry of a
table. The TD errors are those of `ops.q_learning`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env
from rljax.ops import q_learning


class Hyperparams(NamedTuple):
    """Traced: another value needs no other compilation."""

    alpha: float = 0.5  # step size
    power: float = 0.0  # of the number of updates that divides the step size
    epsilon: float = 0.3  # probability of a uniform action
    gamma: float = 0.9  # discount


class Result(NamedTuple):
    """After a run on S states with A actions."""

    q: jax.Array  # [S A]
    visits: jax.Array  # [S A]
    distance: jax.Array  # [steps] max |Q - truth| after each


class Step(NamedTuple):
    """One step of the environment, and the action that will follow it."""

    state: jax.Array
    action: jax.Array
    reward: jax.Array
    discount: jax.Array  # of the next state's value; 0 where the episode terminated
    next_state: jax.Array
    next_action: jax.Array
    epsilon: jax.Array  # of the policy that acts


class Method(NamedTuple):
    """A TD error, and on how many tables it works."""

    td_error: Callable  # (q [S A], other [S A], step) -> error of q[state, action]; other: the second table
    tables: int = 1  # 2: one of them, drawn at random, is updated at each step


def epsilon_greedy(q, epsilon):
    """Probabilities [A] of the policy; the first of equally good actions is the greedy one."""
    A = q.shape[-1]
    return epsilon / A + (1.0 - epsilon) * jax.nn.one_hot(jnp.argmax(q), A)


def q_learning_error(q, other, step: Step):
    del other
    return q_learning.q_learning(q[step.state], step.action, step.reward, step.discount, q[step.next_state])


def sarsa_error(q, other, step: Step):
    del other
    next_q = q[step.next_state]
    return q_learning.sarsa(q[step.state], step.action, step.reward, step.discount, next_q, step.next_action)


def expected_sarsa_error(q, other, step: Step):
    del other
    next_q = q[step.next_state]
    next_probs = epsilon_greedy(next_q, step.epsilon)
    return q_learning.expected_sarsa(q[step.state], step.action, step.reward, step.discount, next_q, next_probs)


def double_q_error(q, other, step: Step):
    next_q = other[step.next_state]
    selector = q[step.next_state]
    return q_learning.double_q_learning(q[step.state], step.action, step.reward, step.discount, next_q, selector)


Q_LEARNING = Method(q_learning_error)
SARSA = Method(sarsa_error)
EXPECTED_SARSA = Method(expected_sarsa_error)
DOUBLE_Q = Method(double_q_error, tables=2)


def make_train(env: Env, method: Method, num_states: int, num_steps: int) -> Callable:
    """train(key, hyper, truth [S A]) -> Result. `env` observes the number of its state.

    The next action is drawn before the update, as SARSA needs it. Double Q-learning acts by the mean of its tables.
    """

    def mean_table(tables):
        return tables.mean(axis=0) if method.tables == 2 else tables[0]

    def act(key, tables, state, epsilon):
        return jax.random.categorical(key, jnp.log(epsilon_greedy(mean_table(tables)[state], epsilon)))

    def train(key, hyper: Hyperparams, truth) -> Result:
        def iteration(carry, key):
            tables, visits, s, env_state, action = carry
            step_key, action_key, reset_key, first_action_key, table_key = jax.random.split(key, 5)
            out = env.step(step_key, env_state, action, env.params)
            next_action = act(action_key, tables, out.observation, hyper.epsilon)
            discount = jnp.where(out.terminated, 0.0, hyper.gamma)
            step = Step(s, action, out.reward, discount, out.observation, next_action, hyper.epsilon)

            table = jax.random.randint(table_key, (), 0, 2) if method.tables == 2 else 0
            error = method.td_error(tables[table], tables[1 - table], step)
            visits = visits.at[table, s, action].add(1)
            step_size = hyper.alpha / visits[table, s, action] ** hyper.power
            tables = tables.at[table, s, action].add(step_size * error)

            reset_s, reset_state = env.reset(reset_key, env.params)
            first_action = act(first_action_key, tables, reset_s, hyper.epsilon)
            s, env_state, action = jax.tree.map(
                lambda after_reset, otherwise: jnp.where(out.terminated | out.truncated, after_reset, otherwise),
                (reset_s, reset_state, first_action),
                (out.observation, out.state, next_action),
            )
            distance = jnp.abs(mean_table(tables) - truth).max()
            return (tables, visits, s, env_state, action), distance

        reset_key, action_key, key = jax.random.split(key, 3)
        tables = jnp.zeros((2, num_states, env.actions))
        visits = jnp.zeros(tables.shape, jnp.int32)
        s, env_state = env.reset(reset_key, env.params)
        carry = (tables, visits, s, env_state, act(action_key, tables, s, hyper.epsilon))
        (tables, visits, *_), distance = jax.lax.scan(iteration, carry, jax.random.split(key, num_steps))
        return Result(mean_table(tables), visits.sum(axis=0), distance)

    return train
