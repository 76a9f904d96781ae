"""A server as the source of a training run's completions: weights go to it before each step, and its answers are
checked."""

import secrets
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.common import models, settings
from rljax.models.decoder import DecoderConfig
from rljax.rewards.judge import served_model
from rljax.rewards.server import (
    DEFAULT_LIMITS,
    MAX_BYTES,
    RequestError,
    ask_all,
    check_reachable,
    check_url,
    request_json,
)
from rljax.rollouts.remote import sample_remote
from rljax.train import distributed
from rljax.train.log import log_info
from rljax.types import Array, PromptBatch, Sampling, TrainState, Trajectory

SampleFn = Callable[[TrainState, int, PromptBatch, Sampling], Trajectory]
# {"log_ratio": log π - log π_sampler [B T], ..}, as of `train.make_token_columns`
TokenColumnsFn = Callable[[TrainState, Trajectory], dict[str, Array]]
CHECKED_STEPS = 2  # whose log-probs are compared: with the first weights, and with those after the first update
PROMPT_TOKEN_BYTES = 16  # of a prompt's token in an answer: its id
TOKEN_BYTES = 1024  # of a sampled token: id, log-prob, and its text up to three times
WEIGHTS_SECONDS = 600.0  # for a server to take new weights


def is_off_policy(options: settings.Server) -> bool:
    """Whether a server's completions are another policy's than the trainer's, by more than rounding."""
    return bool(options.url) and (options.weights == "keep" or options.max_gap > settings.Server.max_gap)


def connect_server(cfg: Any, config: DecoderConfig, token_columns: TokenColumnsFn) -> SampleFn | None:
    """sample(state, step, prompts, sampling) by the server that `cfg.server` names; None where it names none.

    cfg: the Config of a recipe, of which it reads model, server and seed. Raises ValueError where there is no server,
    or it lists no model.
    """
    options = cfg.server
    if not options.url:
        return None
    if distributed.process_count() > 1:
        raise ValueError("--server.url with several processes; legal: one process")
    url = options.url.rstrip("/")
    check_url(url)
    check_reachable(url)
    model = served_model(url)
    run = secrets.token_hex(4)  # another run's weights of the same step are another version
    checked = []

    def sample(state: TrainState, step: int, prompts: PromptBatch, sampling: Sampling) -> Trajectory:
        version = None
        if options.weights == "push":
            version = f"{run}:{step}"
            push_weights(state, config, cfg.model, url, version)
        ask = partial(ask_server, url)
        traj = sample_remote(ask, model, prompts, sampling, cfg.seed, step, config.vocab_size, version)
        if options.weights == "push" and len(checked) < CHECKED_STEPS:
            log_ratio = token_columns(state, traj)["log_ratio"]
            checked.append(check_gap(log_ratio, traj, url, options.max_gap))
        return traj

    return sample


def ask_server(url: str, bodies: list[dict]) -> list[Any]:
    """The answers of POST {url}/completions. Raises RuntimeError, naming the first that failed."""

    def ask(body: dict, seconds: float) -> Any:
        return request_json(f"{url}/completions", body, seconds, most_bytes=answer_bytes(body))

    replies = ask_all(ask, bodies, DEFAULT_LIMITS._replace(timeout_seconds=DEFAULT_LIMITS.step_timeout_seconds))
    failed = [reply for reply in replies if reply.status != "ok"]
    if failed:
        raise RuntimeError(
            f"the server at {url} gave no completions for {len(failed)} of {len(bodies)} prompts: {failed[0].status}, "
            f"{failed[0].detail}. Start it again and run the same command: the run goes on"
        )
    return [reply.value for reply in replies]


def answer_bytes(body: dict) -> int:
    """Most bytes of the answer to a request of completions, whose ids, log-probs and texts are written as JSON."""
    return MAX_BYTES + body["n"] * (PROMPT_TOKEN_BYTES * len(body["prompt"]) + TOKEN_BYTES * body["max_tokens"])


def push_weights(state: TrainState, config: DecoderConfig, source: str, url: str, version: str) -> None:
    """Write the weights of the policy, and have the server load them as this version, by SGLang's address.

    Raises RuntimeError where it does not: a server on another machine sees another disk.
    """
    address = f"{url.removesuffix('/v1')}/update_weights_from_disk"
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        directory = Path(folder) / "model"
        models.save_pretrained(state.params, state.frozen, config, source, directory, dtype="float32")
        body = {"model_path": str(directory), "weight_version": version}
        try:
            request_json(address, body, WEIGHTS_SECONDS)  # answered when they are loaded
        except RequestError as error:
            raise RuntimeError(
                f"the server does not take the weights of version {version} ({address}: {error.detail}); legal: SGLang "
                "or experiments/serve.py on a disk that both see, or --server.weights keep, which corrects for older "
                "ones"
            ) from None


def check_gap(log_ratio: Array, traj: Trajectory, url: str, limit: float) -> float:
    """The largest |log-prob of the trainer - log-prob of the server|, in nats.

    Raises RuntimeError where it is above the limit.
    """
    gap = float(jnp.where(traj.mask, jnp.abs(log_ratio), 0.0).max())
    log_info(f"log-probs of the trainer and of {url} differ by at most {gap:.2g} nats")
    if not gap <= limit:
        raise RuntimeError(
            f"log-probs of the trainer and of {url} differ by up to {gap:.2g} nats: another model, other weights, or "
            "log-probs at another temperature (vLLM: --logprobs-mode processed_logprobs); legal: at most "
            f"{limit:g}, or for a server in half precision a larger --server.max_gap, whose rollouts are then corrected"
        )
    return gap
