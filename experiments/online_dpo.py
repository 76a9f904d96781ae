r"""Preference optimization of a policy's own completions: online DPO, XPO, Nash-MD.

    python experiments/online_dpo.py --model DIR --prompts experiments/story_openings.jsonl --rewards animals
    python experiments/online_dpo.py --model runs/sft/RUN/model --prompts FILE.jsonl \
        --rewards runs/reward_model/RUN/model --method xpo

A step samples completions, judges them by a reward model or verifiers, and learns which is better:

    online_dpo   the best of a prompt's `num_generations` completions against the worst, by any loss of DPO's family
    xpo          a completion against one of the reference's, and a bonus for leaving these (arXiv:2405.21046)
    nash_md      P(y better than y'), σ of the difference of their rewards, y' from a mixture of the policy and the
                 reference (arXiv:2312.00886)

With online_dpo a prompt whose completions are equally good makes no pair. With xpo the policy's own is then the chosen
one, as in TRL (the paper draws it); verifiers of 0 and 1 make many such pairs. The reference is the model as it was at
the start.

Reached: stories260k as rlhf.py fine-tunes it, against its reward model (seed 0; --batches.prompts 16
--batches.num_generations 4 --sampling.max_tokens 80 --optimizer.learning_rate 3e-4 --optimizer.schedule constant):
reward of 256 held-out stories -2.25 -> 2.32 at a KL of 13.5 nats a story, in about 60 s of CPU time. xpo
and nash_md: not yet run at this size.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax

from experiments.common import command_line, models, runs, settings, train
from experiments.common.online_methods import METHODS, Preference, check_preference
from experiments.common.optimizer import make_optimizer
from experiments.common.rewards import check_compared_in_training, load_score, read_rewards
from experiments.common.sampling import make_sample_scored, training_sampling
from experiments.common.settings import Batches, MeshShape, Optimizer, Rare, Reward, Sampling, Weights
from experiments.common.verifiers import VERIFIERS
from rljax.models import decoder, policy
from rljax.rewards.pool import Pool
from rljax.train.mesh import make_mesh, place
from rljax.train.metrics import rollout_metrics
from rljax.train.update import learn, make_update
from rljax.types import TrainState

PROGRESS_METRICS = ("reward", "accuracy", "margin", "kl_sequence", "length", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Config:
    """Online DPO, XPO or Nash-MD on a pretrained model."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str | tuple[str, ...]  # files of rows, whose fields are the columns of a prompt; FILE=WEIGHT mixes them
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: settings.Rows = settings.Rows()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    rewards: tuple[str, ...] = ("number",)  # NAME or NAME=WEIGHT each; see docs/rewards.md
    reward: Reward = Reward()
    method: Literal["online_dpo", "xpo", "nash_md"] = "online_dpo"  # how to learn
    preference: Preference = Preference()
    seed: int = 0  # of the order of prompts and of sampling
    steps: int = 20  # steps: sample, score, update
    batches: Batches = Batches(prompts=32, num_generations=2)
    sampling: Sampling = Sampling(max_tokens=128)
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="cosine")
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape()
    eval_prompts: Rare[int] = 32  # prompts held out for evaluation
    eval_samples: Rare[int] = 256  # completions to these in each evaluation
    eval_every: Rare[int] = 0  # steps between evaluations, the best model is kept; 0: before and after training only
    save_every: int = 20  # steps between checkpoints
    log_samples_every: Rare[int] = 10  # steps between samples in the report
    directory: str = ""  # of the run; default runs/online_dpo/METHOD-MODEL-PROMPTS-seedSEED
    debug: bool = False  # one small step without jit, with NaN checks


def main(cfg: Config, verifiers: dict = VERIFIERS) -> dict[str, dict[str, float]]:
    """Train; return reward and KL on the eval prompts before and after."""
    check_compared_in_training(cfg)
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward)
    cfg = runs.checked(cfg)
    mesh = make_mesh(**cfg.mesh.sizes)
    train.check_whole_groups(cfg.batches)
    check_preference(cfg.method, cfg.preference)

    # -- model and data
    tokenizer, train_prompts, eval_prompts = runs.read_data(cfg, rewards.verifiers)
    context = max(train_prompts.length, eval_prompts.length) + cfg.sampling.max_tokens
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context, cfg.seed)
    model = policy.make_policy(config)
    method = METHODS[cfg.method](cfg.preference, cfg.batches, config, model)
    train.check_batches(method.rows, mesh)
    sampling = training_sampling(cfg.sampling, cfg.batches.num_generations, tokenizer, config.vocab_size)

    # -- training state
    optimizer = make_optimizer(cfg.optimizer, cfg.steps * cfg.batches.epochs * cfg.batches.minibatches)
    state = TrainState(0, params, optimizer.init(params), jax.random.key(cfg.seed), frozen=frozen)
    shardings = train.shardings_of(mesh, state, optimizer, config, cfg.weights.offload, show=cfg.mesh.show_sharding)

    # -- the functions of a step
    lm = decoder.language_model(config)
    sizes = (cfg.batches, shardings, config, train_prompts.length, cfg.sampling.max_tokens)
    annotate = train.cut_annotate(policy.make_annotate(model, ("ref_logp",)), *sizes)
    make = partial(make_update, method.objective, optimizer, shardings=shardings)
    max_tokens = cfg.sampling.max_tokens * method.completions_per_row
    update = train.cut_update(make, method.rows, shardings, config, train_prompts.length, max_tokens)
    run = runs.make_run(cfg, __file__, cfg.method, method.objective, rewards.verifiers, PROGRESS_METRICS)

    # -- the loop
    with run, Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        models.keep_model_files(cfg.model, run.directory / "model_files", config.adapter)  # for tools/export.py
        score = load_score(rewards, tokenizer, pool, mesh, cfg.weights.dtype, run.directory)
        sample_scored = make_sample_scored(lm, annotate, score, sampling, shardings, cfg.seed)
        evaluation = (eval_prompts, sampling, cfg.eval_samples, cfg.seed, cfg.batches, shardings)
        evaluate = train.make_evaluate(lm, annotate, score, *evaluation)
        state = place(state, shardings.state, donate=True)
        train.check_batch_invariance(config, lm, model, state)
        sample_scored, update, evaluate = run.timed(sample_and_score=sample_scored, update=update, eval=evaluate)
        before = train.before_training(run, evaluate, state)
        state = run.restore(state)
        for step in run.steps(state.step):
            prompts = train_prompts.draw(state.cursor, cfg.batches.prompts)
            traj = sample_scored(state, prompts, step)
            other = method.opponent and sample_scored(state, prompts, step, method.opponent(state))
            batch = method.make_batch(traj, other)
            state, metrics = learn(update, state, batch, cfg.batches.epochs, cfg.batches.minibatches)
            state = state.replace(step=step + 1, cursor=prompts.cursor)
            state = models.sync_reference(state, cfg.weights)
            if run.should_log_samples(step):
                run.log_samples(step, runs.without_credit(traj), tokenizer.decode, score.names, prompts)
            metrics = rollout_metrics(traj, score.names) | metrics
            metrics |= runs.evaluate_when_due(cfg, run, step, state, config, evaluate)
            run.record(step, state, metrics)
        after = runs.evaluate_at_end(cfg, run, state, config, evaluate)
        models.save_pretrained(state.params, state.frozen, config, cfg.model, run.directory / "model")
    return runs.summarize(cfg, before, after, run.directory / "model")


if __name__ == "__main__":
    command_line.run(Config, main)
