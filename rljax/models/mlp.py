"""Multilayer perceptrons for control: a separate actor and critic, discrete or continuous actions; and Q-networks.

Weights begin as independent normals of variance 1/in (LeCun et al. 1998), times 0.01 in the policy's head, biases 0.
PPO's implementations begin with orthogonal weights of gain √2; docs/control.md measures both.

A policy over continuous actions is a Gaussian with independent dimensions and a standard deviation that is the same in
every state. Environments clip actions to their bounds (those of gymnax: its adapter); log-probs are of the unclipped
action.
"""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Shaped

from rljax.ops.kl import gaussian_entropy, gaussian_kl
from rljax.ops.logprobs import gaussian_logp, softmax, softmax_logp, token_statistics
from rljax.ops.sampling import argmax, invert_cdf
from rljax.ops.trust_region import directed_kl
from rljax.types import Params, PolicyOutput, Trajectory

Activation = Callable[[Array], Array]
PolicyDistribution = Array | tuple[Array, Array]  # logits [.. A], or (mean, std) [.. D] each


def init_layers(
    key: Array, sizes: tuple[int, ...], activation: Activation = jnp.tanh, last_gain: float = 1.0
) -> list[dict]:
    """For each layer {"w" [in out], "b" [out]}; the last w is multiplied by `last_gain`.

    Hidden layers also have "activation", which has no leaf.
    """
    layers = []
    for n, (inputs, outputs) in enumerate(pairwise(sizes)):
        normal = jax.random.normal(jax.random.fold_in(key, n), (inputs, outputs))
        layers.append({"w": inputs**-0.5 * normal, "b": jnp.zeros(outputs)})
    for layer in layers[:-1]:
        layer["activation"] = Partial(activation)
    layers[-1]["w"] *= last_gain
    return layers


def apply_layers(layers: list[dict], x: Float[Array, "*N inputs"]) -> Float[Array, "*N outputs"]:
    """The network's output. Computed on two axes: CPU matmuls on three are slower."""
    out = x.reshape(-1, x.shape[-1])
    for layer in layers:
        out = out @ layer["w"] + layer["b"][None]
        out = layer["activation"](out) if "activation" in layer else out
    return out.reshape(*x.shape[:-1], -1)


# -------------------------------------------------------------------------------------------------- actor and critic


def init(
    key: Array,
    observation: int,
    actions: int,
    width: int = 64,
    continuous: bool = False,
    activation: Activation = jnp.tanh,
) -> Params:
    """{"actor", "critic"}, two hidden layers each.

    Args:
      observation: size of an observation.
      actions: number of discrete actions, or of the dimensions of a continuous one.
      width: of the hidden layers.
    """
    actor_key, critic_key = jax.random.split(key)
    actor = {"layers": init_layers(actor_key, (observation, width, width, actions), activation, last_gain=0.01)}
    if continuous:
        actor["log_std"] = jnp.zeros(actions)
    critic = init_layers(critic_key, (observation, width, width, 1), activation)
    return {"actor": actor, "critic": critic}


def distribution(params: Params, observations: Float[Array, "*N O"]) -> PolicyDistribution:
    """Logits [.. A]; or (mean, standard deviation) [.. D] each."""
    actor = params["actor"]
    out = apply_layers(actor["layers"], observations)
    if "log_std" not in actor:
        return out
    return out, jnp.broadcast_to(jnp.exp(actor["log_std"]), out.shape)


def values_of(params: Params, observations: Float[Array, "*N O"]) -> Float[Array, "*N"]:
    """V of each observation."""
    return apply_layers(params["critic"], observations)[..., 0]


def act(
    params: Params, uniforms: Float[Array, "B U"], observations: Float[Array, "B O"]
) -> tuple[Shaped[Array, "B ..."], Float[Array, "B"]]:
    """Actions [B] or [B D] and their log-probs: the inverse CDF at uniforms [B 1] or [B D]."""
    dist = distribution(params, observations)
    if isinstance(dist, tuple):
        mean, std = dist
        actions = mean + std * jax.scipy.special.ndtri(jnp.maximum(uniforms, 2.0**-24))
        return actions, gaussian_logp(mean, std, actions)
    probs = softmax(dist, jnp.ones(dist.shape[0]))
    actions = invert_cdf(probs.masses, uniforms[:, 0])
    return actions, softmax_logp(probs, actions)


def act_greedily(
    params: Params, uniforms: Float[Array, "B U"], observations: Float[Array, "B O"]
) -> tuple[Shaped[Array, "B ..."], Float[Array, "B"]]:
    """The most likely actions; their log-probs are 0."""
    dist = distribution(params, observations)
    actions = dist[0] if isinstance(dist, tuple) else dist.argmax(axis=-1)
    return actions, jnp.zeros(observations.shape[0])


def kl_of(old: PolicyDistribution, new: PolicyDistribution, kl_direction: str = "old_new") -> Float[Array, "*N"]:
    """KL between two outputs of `distribution`, in either direction (`ops.trust_region.directed_kl`)."""
    if not isinstance(new, tuple):
        return directed_kl(old, new, kl_direction)
    by_dimension = directed_kl(old, new, kl_direction, lambda p, q: gaussian_kl(*p, *q))
    return by_dimension.sum(axis=-1)


def make_mlp_policy() -> Callable[[Params, Params, Trajectory], PolicyOutput]:
    """policy(params, frozen, trajectory) -> PolicyOutput. `frozen` may hold what is not trained, e.g. "critic"."""

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        params = {**frozen, **params}
        dist = distribution(params, traj.inputs)
        values = values_of(params, traj.inputs)
        kl = None if traj.dist is None else kl_of(traj.dist, dist)
        if isinstance(dist, tuple):
            mean, std = dist
            logp = gaussian_logp(mean, std, traj.actions)
            return PolicyOutput(logp, gaussian_entropy(std).sum(axis=-1), values, kl)
        logp, entropy, sum_pi_squared = token_statistics(dist, traj.actions, jnp.ones(traj.actions.shape))
        return PolicyOutput(logp, entropy, values, kl, sum_pi_squared)

    return policy


def make_mlp_divergence(kl_direction: str = "old_new") -> Callable[[Params, Params, Params, Trajectory], Array]:
    """divergence(params, old, frozen, trajectory) -> exact KL [B T] between `traj.dist` and the policy.

    By default KL(traj.dist ‖ policy). `traj.dist` is the distribution of `old`, which is not computed again.
    """

    def divergence(params: Params, old: Params, frozen: Params, traj: Trajectory) -> Float[Array, "B T"]:
        return kl_of(traj.dist, distribution(params, traj.inputs), kl_direction)

    return divergence


def annotate(params: Params, traj: Trajectory) -> Trajectory:
    """An environment's trajectory with values [B T+1], final_values [B T] and the distribution of these parameters.

    It is the distribution that actions were drawn from, unless the actor has older parameters. The last column of
    values is V of the observation after the last decision.
    """
    final_values = values_of(params, traj.next_inputs)
    values = jnp.concatenate([values_of(params, traj.inputs), final_values[:, -1:]], axis=1)
    return traj.replace(values=values, final_values=final_values, dist=distribution(params, traj.inputs))


# ---------------------------------------------------------------------------------------------------------- Q-network


def init_q(key: Array, observation: int, actions: int, widths: tuple[int, ...] = (120, 84)) -> list[dict]:
    """A Q-network with ReLU between its layers; widths and first weights are those of PureJaxRL's DQN."""
    return init_layers(key, (observation, *widths, actions), jax.nn.relu)


def q_values(params: list[dict], observations: Float[Array, "*N O"]) -> Float[Array, "*N A"]:
    """Q of each action."""
    return apply_layers(params, observations)


def act_epsilon_greedily(
    params: tuple[list[dict], float | Array], uniforms: Float[Array, "B 1"], observations: Float[Array, "B O"]
) -> tuple[Shaped[Array, "B"], Float[Array, "B"]]:
    """With probability ε a uniform action, else the best one. Log-probs are not computed: 0.

    Args:
      params: (Q-network, ε).
    """
    network, epsilon = params
    q = q_values(network, observations)
    uniform = uniforms[:, 0]
    num_actions = q.shape[1]
    # Below ε a uniform number is, divided by ε, uniform again.
    random_action = (uniform / jnp.maximum(epsilon, 1e-8) * num_actions).astype(jnp.int32)
    random_action = jnp.minimum(random_action, num_actions - 1)
    return jnp.where(uniform < epsilon, random_action, argmax(q)), jnp.zeros(uniform.shape)
