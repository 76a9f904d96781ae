"""A finished model judged as the scripts that sample judge theirs: the same prompts, samples, rewards and reference."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.common import models, runs, train
from experiments.common.rewards import load_score, read_rewards
from experiments.common.sampling import training_sampling
from experiments.common.verifiers import VERIFIERS
from rljax.models import decoder, policy
from rljax.rewards.pool import Pool
from rljax.train.mesh import make_mesh
from rljax.types import TrainState


def judge_model(cfg: Any, directory: str) -> dict[str, float]:
    """Reward and KL to `cfg.model` of the model in `directory`, which has the shape of that one.

    cfg: the Config of a script that samples (grpo.py, say): its first and last evaluation are done like this one.
    """
    mesh = make_mesh(**cfg.mesh.sizes)
    rewards = read_rewards(cfg.rewards, VERIFIERS, cfg.reward)
    tokenizer, train_prompts, eval_prompts = runs.read_data(cfg, rewards.verifiers)
    context = max(train_prompts.length, eval_prompts.length) + cfg.sampling.max_tokens
    config, _, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context, cfg.seed)
    params = models.load_decoder(directory, config, mesh, "float32")
    state = TrainState(0, params, optax.EmptyState(), jax.random.key(cfg.seed), frozen=frozen)
    sampling = training_sampling(cfg.sampling, cfg.batches.num_generations, tokenizer, config.vocab_size)
    shardings = train.shardings_of(mesh, state, optax.identity(), config)
    sizes = (cfg.batches, shardings, config, train_prompts.length, cfg.sampling.max_tokens)
    annotate = train.cut_annotate(policy.make_annotate(policy.make_policy(config), ("ref_logp",)), *sizes)
    with Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool, tempfile.TemporaryDirectory() as answers:
        score = load_score(rewards, tokenizer, pool, mesh, cfg.weights.dtype, Path(answers))
        lm = decoder.language_model(config)
        evaluation = (eval_prompts, sampling, cfg.eval_samples, cfg.seed, cfg.batches, shardings)
        evaluate = train.make_evaluate(lm, annotate, score, *evaluation)
        return evaluate(state)
