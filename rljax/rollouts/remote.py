"""Completions from a server that speaks OpenAI's protocol, as a trajectory: vLLM, SGLang, or experiments/serve.py.

Ids go in and ids come out; text is never encoded again. Each answer is checked: the model's name, the ids of the
prompt, as many log-probs as tokens, stops that the trainer knows, the version of the weights. What does not hold is
one error. Whether the log-probs are the trainer's is for the trainer to compare.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rljax.rollouts.sample_token import distribution_settings
from rljax.types import PromptBatch, Sampling, Trajectory, trajectory_of_tokens

UNKNOWN_VERSION = -1  # `Trajectory.version` of tokens whose server does not tell it
ROUNDING = 1e-4  # by which a log-prob may be above 0
# Values that leave the distribution as it is. vLLM and SGLang take a field that a request lacks from the model's
# generation_config.json, and may report log-probs of the whole distribution all the same, in which no gap shows it.
WHOLE_DISTRIBUTION = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class ServerAnswerError(ValueError):
    """A server's answer is not what it was asked for."""


class SampledCompletion(NamedTuple):
    """A completion as a server sampled it."""

    tokens: list[int]  # the stop token included
    logp: list[float]
    terminated: bool
    version: int


def sample_remote(
    ask_all: Callable[[list[dict]], list[Any]],
    model: str,
    prompts: PromptBatch,
    sampling: Sampling,
    seed: int,
    step: int,
    vocab_size: int,
    version: str | None,
) -> Trajectory:
    """`sampler.sample` by a server: B = P·n rows, with the number of their version on all tokens that were chosen.

    Args:
      ask_all: bodies of completion requests -> their answers, in this order.
      model: its name at the server.
      version: of the weights that must have answered, as the server knows it (`metadata.weight_version`): a number, or
        RUN:NUMBER; None: any.
    Raises ValueError for settings that a server cannot be asked for, ServerAnswerError for an answer that is none.
    """
    check_remote(prompts, sampling)
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    ids = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    numbers = np.asarray(prompts.number).tolist()
    temperatures = np.broadcast_to(sampling.temperature, len(ids)).tolist()
    bodies = [
        completion_request(model, prompt, sampling.replace(temperature=temperature), seed, step, number)
        for prompt, temperature, number in zip(ids, temperatures, numbers, strict=True)
    ]
    completions = []
    for body, answer in zip(bodies, ask_all(bodies), strict=True):
        completions += read_completions(body, answer, vocab_size, version)
    return _build_trajectory(prompts, completions, sampling)


def check_remote(prompts: PromptBatch, sampling: Sampling) -> None:
    """Raise ValueError for settings under which a server's log-probs would not be those of the trainer's policy."""
    changed = distribution_settings(sampling)
    unsent = ("support", "stop_strings", "max_concurrent", "stop_after")
    others = [name for name in unsent if getattr(sampling, name) is not None]
    if prompts.resume is not None:
        others.append("resume")
    if changed or others:
        raise ValueError(
            f"{[*changed, *others][0]} is set; legal with a server: temperature, n and max_tokens alone, so that "
            "log-probs are those of the whole distribution and completions end at stop tokens"
        )
    if np.any(np.asarray(sampling.temperature) == 0):
        raise ValueError("temperature = 0; legal with a server: above 0")


def completion_request(
    model: str, prompt: list[int], sampling: Sampling, seed: int, step: int, number: int
) -> dict[str, Any]:
    """The body of POST /v1/completions for the completions of one prompt, all at the same temperature.

    `key` names the samples for experiments/serve.py: those of `sampler.sample`, where its --seed is this one. Others
    take `seed`, which differs from prompt to prompt.
    """
    mixed = np.random.SeedSequence([seed, step % 2**32, number % 2**32]).generate_state(1)[0]
    return {
        "model": model,
        "prompt": prompt,
        "n": sampling.n,
        "max_tokens": sampling.max_tokens,
        "temperature": float(sampling.temperature),
        **WHOLE_DISTRIBUTION,
        "seed": int(mixed % 2**31),
        "key": [step, number],
        "stop_token_ids": list(sampling.stop),
        "logprobs": 1,
        "return_token_ids": True,
    }


def read_completions(body: dict, answer: Any, vocab_size: int, version: str | None) -> list[SampledCompletion]:
    """The n completions of an answer to `body`. Raises ServerAnswerError, which says what was expected."""
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ServerAnswerError(f"the server answered {str(answer)[:100]!r}; legal: a JSON object with `choices`")
    for choice in answer["choices"]:
        if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
            raise ServerAnswerError(
                f"the server gave the choice {str(choice)[:100]!r}; legal: an object with its `index`"
            )
    if answer.get("model", body["model"]) != body["model"]:
        raise ServerAnswerError(f"the server answered with the model {answer['model']!r}, not {body['model']!r}")
    found = _told_version(answer)
    if version is not None and found != version:
        told = "tells no version" if found is None else f"answered with version {found[:40]} of the weights"
        raise ServerAnswerError(
            f"the server {told}, the trainer's is {version}; legal: the same in `metadata.weight_version` of the "
            "answer, as a server gives that takes weights, or training that corrects for older ones"
        )
    choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
    if len(choices) != body["n"]:
        raise ServerAnswerError(f"the server gave {len(choices)} completions; legal: {body['n']}, as n says")
    return [_read_choice(body, choice, vocab_size, _version_number(found)) for choice in choices]


def _told_version(answer: dict) -> str | None:
    """The version of the weights that answered; None where the server tells none."""
    metadata = answer.get("metadata")
    told = metadata.get("weight_version") if isinstance(metadata, dict) else None
    return str(told) if isinstance(told, str) or type(told) is int else None


def _version_number(told: str | None) -> int:
    number = (told or "").rpartition(":")[2]
    is_number = number.isascii() and number.isdecimal() and len(number) < 10  # of 32 bits
    return int(number) if is_number else UNKNOWN_VERSION


def _read_choice(body: dict, choice: dict, vocab_size: int, version: int) -> SampledCompletion:
    tokens = choice.get("token_ids")
    logprobs = choice.get("logprobs")
    logp = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not isinstance(logp, list):
        missing = "token ids" if not isinstance(tokens, list) else "log-probs"
        raise ServerAnswerError(f"the server gives no {missing}; legal: one with `return_token_ids` and `logprobs`")
    if choice.get("prompt_token_ids") not in (None, body["prompt"]):
        raise ServerAnswerError("the server read another prompt than the ids it was sent; legal: ids as they are")
    if not 0 < len(tokens) <= body["max_tokens"] or len(tokens) != len(logp):
        raise ServerAnswerError(
            f"the server gave {len(tokens)} tokens and {len(logp)} log-probs; legal: equally many, at most "
            f"{body['max_tokens']}"
        )
    wrong = [token for token in tokens if type(token) is not int or not 0 <= token < vocab_size]
    if wrong:
        raise ServerAnswerError(f"the server gave the id {wrong[0]!r}; legal: below the trainer's {vocab_size}")
    bad = [value for value in logp if not isinstance(value, int | float) or not -math.inf < value <= ROUNDING]
    if bad:
        raise ServerAnswerError(f"the server gave the log-prob {bad[0]!r}; legal: a finite number, at most 0")
    stops = [k for k, token in enumerate(tokens) if token in body["stop_token_ids"]]
    terminated = choice.get("finish_reason") == "stop"
    if stops[:1] != ([len(tokens) - 1] if terminated else []):
        raise ServerAnswerError(
            f"a completion of the server ended by {choice.get('finish_reason')!r} with the ids ... {tokens[-3:]}; "
            f"legal: a stop is the last id, one of {body['stop_token_ids']}"
        )
    return SampledCompletion(tokens, logp, terminated, version)


def _build_trajectory(prompts: PromptBatch, completions: Sequence[SampledCompletion], sampling: Sampling) -> Trajectory:
    """Each completion after its prompt, in the columns that `sampler.sample` gives them."""
    P, L = np.shape(prompts.tokens)
    R, N = P * sampling.n, sampling.max_tokens
    temperature = np.broadcast_to(sampling.temperature, P)
    tokens = np.zeros((R, N), np.int32)
    logp = np.zeros((R, N), np.float32)
    version = np.zeros((R, N), np.int32)
    lengths = np.array([len(completion.tokens) for completion in completions])
    for row, completion in enumerate(completions):
        tokens[row, : lengths[row]] = completion.tokens
        logp[row, : lengths[row]] = np.minimum(completion.logp, 0.0)
        version[row, : lengths[row]] = completion.version
    chosen = np.arange(N) < lengths[:, None]
    last = np.arange(N) == lengths[:, None] - 1
    terminated = np.array([completion.terminated for completion in completions])[:, None]

    def after_prompt(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((R, L), values.dtype), values], axis=1)

    def of_prompt(values) -> np.ndarray:
        return np.repeat(np.asarray(values), sampling.n, axis=0)

    return trajectory_of_tokens(
        tokens=np.concatenate([of_prompt(prompts.tokens), tokens], axis=1),
        segments=np.concatenate([of_prompt(prompts.mask), chosen], axis=1).astype(np.int32),
        chosen=jnp.asarray(after_prompt(chosen)),
        logp=jnp.asarray(after_prompt(logp)),
        temperature=jnp.asarray(np.broadcast_to(of_prompt(temperature)[:, None], (R, L + N)), jnp.float32),
        terminated=jnp.asarray(after_prompt(last & terminated)),
        truncated=jnp.asarray(after_prompt(last & ~terminated)),
        version=jnp.asarray(after_prompt(version)),
        group=jnp.asarray(of_prompt(prompts.number)),
    )
