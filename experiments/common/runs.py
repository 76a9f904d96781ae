"""What scripts share that sample prompts from a file: their data, their run directory, their last line."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from experiments.common import data, hub, train
from experiments.common.best import keep_best
from experiments.common.inputs import inputs_of
from experiments.common.rows import Read, make_shape
from experiments.common.settings import LOGISTICS, PLACEMENT, one_small_step
from experiments.common.unread import check_unread
from experiments.common.verifiers import check_answers, check_rubric_columns
from rljax.data.prompts import Prompts
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.models import hf
from rljax.models.decoder import DecoderConfig
from rljax.rewards.pool import Pool
from rljax.train.log import log_info
from rljax.train.run import Run
from rljax.types import Batch, TrainState, Trajectory

T = TypeVar("T")


def checked(cfg: T, least_group: int = 1) -> T:
    """The settings of a run, with --debug those of one small step.

    least_group: of the algorithm. Raises ValueError for settings that nothing reads, and for evaluations of nothing.
    """
    check_unread(cfg)
    check_evaluation(cfg)
    return one_small_step(cfg, least_group) if cfg.debug else cfg


def check_evaluation(cfg: Any) -> None:
    """Raise ValueError for evaluations of nothing."""
    if cfg.eval_samples < 1:
        raise ValueError(f"eval_samples = {cfg.eval_samples}; legal: at least 1")


def read_data(
    cfg: Any, verifiers: Mapping[str, Callable] | None = None, read: Read = data.read_prompt
) -> tuple[Tokenizer, Prompts, Prompts]:
    """The tokenizer, prompts to train on, and prompts to evaluate on, as a script's Config says.

    read: of `data.read_prompts`. Raises ValueError for rows whose answers the verifiers cannot judge by.
    """
    tokenizer, max_tokens = _tokenizer_and_limit(cfg)
    files = data.read_files(cfg.prompts)
    sizes = (max_tokens, cfg.eval_prompts, cfg.seed)
    prompts = data.read_prompts(files, cfg.template, tokenizer, *sizes, cfg.data, read)
    lengths = [len(ids) for ids in prompts[0].encoded]
    data.report_padding(lengths, prompts[0].length, "prompts", "--max_prompt_tokens {} leaves the others out")
    _check_answers(cfg, files, verifiers)
    return tokenizer, *prompts


def read_all_prompts(cfg: Any, verifiers: Mapping[str, Callable] | None = None) -> tuple[Tokenizer, Prompts]:
    """The tokenizer and all prompts of a script's Config. Raises as `read_data` does."""
    tokenizer, max_tokens = _tokenizer_and_limit(cfg)
    shape = make_shape(cfg.template, "", cfg.data)
    files = data.read_files(cfg.prompts)
    prompts = data.read_all_prompts(files, shape, tokenizer, max_tokens, cfg.seed, cfg.data.overlong)
    _check_answers(cfg, files, verifiers)
    return tokenizer, prompts


def check_whole_prompts(cfg: Any) -> None:
    """Raise ValueError where the script would write prompts of which its completions have read a part only."""
    if cfg.data.overlong.startswith("cut"):
        raise ValueError(
            f"data.overlong = {cfg.data.overlong}: completions would be of a part of the prompt, and the file would "
            "hold the whole one; legal: drop, or error"
        )


def _tokenizer_and_limit(cfg: Any) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many tokens a prompt may have."""
    config = hf.read_config(cfg.model)
    tokenizer = load_tokenizer(cfg.model, config.vocab_size)
    return tokenizer, data.max_prompt_length(cfg.max_prompt_tokens, cfg.sampling.max_tokens, config.max_positions)


def _check_answers(cfg: Any, files: data.Files, verifiers: Mapping[str, Callable] | None) -> None:
    asks_a_judge = any(item.startswith("judge:") for item in getattr(cfg, "rewards", ()))
    for table in files.tables if asks_a_judge else ():
        check_rubric_columns(table, cfg.reward)
    if not verifiers:
        return
    with Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:  # has no processes until one is needed
        for table in files.tables:
            check_answers(table, verifiers, pool)


def name_of(cfg: Any, kind: str = "") -> str:
    """KIND-MODEL-PROMPTS-seedSEED: the default name of a run."""
    parts = (kind, hub.model_name(cfg.model), data.name_of(cfg.prompts), f"seed{cfg.seed}")
    return "-".join(part for part in parts if part) + "-debug" * cfg.debug


def settings_but(cfg: Any, *names: str) -> dict:
    """The settings of a Config without these."""
    return {name: value for name, value in hub.settings_of(cfg).items() if name not in names}


def digest_of(settings: dict) -> str:
    """Eight characters that differ where settings do, for the default name of a run; `directory` does not count."""
    text = json.dumps({name: value for name, value in settings.items() if name != "directory"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def make_run(
    cfg: Any,
    source: str,
    kind: str,
    algorithm: Any,
    verifiers: Mapping[str, Callable],
    progress_metrics: Sequence[str],
) -> Run:
    """The run directory of a script's Config; it keeps the source of the script, of the algorithm and of the verifiers.

    By default that is runs/SCRIPT/KIND-MODEL-PROMPTS-seedSEED.
    """
    return Run(
        cfg.directory or f"runs/{Path(source).stem}/{name_of(cfg, kind)}",
        hub.settings_of(cfg),
        steps=cfg.steps,
        source=source,
        functions={"algorithm": algorithm, "rewards": verifiers},
        inputs=inputs_of(cfg),
        save_every=cfg.save_every,
        log_samples_every=cfg.log_samples_every,
        progress_metrics=progress_metrics,
        placement=PLACEMENT,
        logistics=LOGISTICS,
    )


def make_run_of_one_step(
    cfg: Any, directory: str, settings: dict, source: str, verifiers: Mapping[str, Callable]
) -> Run:
    """The run directory of a script that trains nothing; `settings` are those of cfg that may not change."""
    functions = {"rewards": verifiers}
    inputs = inputs_of(cfg)
    return Run(directory, settings, steps=1, source=source, functions=functions, inputs=inputs, logistics=LOGISTICS)


def summarize(cfg: Any, before: dict[str, float], after: dict[str, float], model: Path) -> dict[str, dict[str, float]]:
    """Print the reward before and after, how far the policy went, and where the model is; what `main` returns."""
    rewards = " -> ".join(f"{found['reward']:.3f} ± {found['error']:.3f}" for found in (before, after))
    reference = "its last update" if cfg.weights.ref_sync_steps else "the start"
    distance = f"at a KL to {reference} of {max(after['kl'], 0):.1f} nats a sequence"
    log_info(f"eval reward: {rewards}, {distance}; model: {model}")
    return {"before": before, "after": after}


def evaluate_when_due(cfg: Any, run: Run, step: int, state: TrainState, *evaluation: Any) -> dict[str, float]:
    """{"eval_METRIC": ...} every `eval_every` steps but the last, the best model being kept; else {}.

    evaluation: config, evaluate, and of another metric than the reward `metric` and `lower_is_better` (`_evaluate`).
    """
    if not train.is_due(cfg.eval_every, step, run.total_steps):
        return {}
    _, logged = _evaluate(cfg, run, state, *evaluation)
    return logged


def evaluate_at_end(cfg: Any, run: Run, state: TrainState, *evaluation: Any) -> dict[str, float]:
    """What `evaluate` says of the last state, whose checkpoint is there; `eval_METRIC` is logged with the last step.

    evaluation: as of `evaluate_when_due`.
    """
    found, logged = _evaluate(cfg, run, state, *evaluation)
    run.add_metrics(logged)
    return found


def _evaluate(
    cfg: Any,
    run: Run,
    state: TrainState,
    config: DecoderConfig,
    evaluate: Callable,
    metric: str = "reward",
    lower_is_better: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """What `evaluate` says, and what is logged of it; the best model is kept."""
    found = evaluate(state)
    name = f"eval_{metric}"
    if cfg.eval_every:
        keep_best(run, state, config, cfg.model, name, found[metric], lower_is_better)
    return found, {name: found[metric]}


def without_credit(traj: Trajectory) -> Batch:
    """A rollout as `Run.log_samples` shows it, where no decision has an advantage of its own."""
    return Batch(traj, jnp.zeros_like(traj.logp), traj.mask)
