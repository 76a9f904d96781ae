r"""The best of n completions of each prompt by a reward: what it gains against n, and data for fine-tuning.

    python experiments/best_of_n.py --model DIR --prompts experiments/story_openings.jsonl --rewards animals --n 16
    python experiments/best_of_n.py --model DIR --prompts FILE.jsonl --rewards runs/reward_model/RUN/model

Rejection-sampling fine-tuning is an iteration of two commands, this one and

    python experiments/sft.py --model DIR --data.files runs/best_of_n/RUN/chosen.jsonl

whose DIRECTORY/model is the --model of the next iteration. A line of DIRECTORY/chosen.jsonl is a row in TRL's
prompt-completion format, {"prompt", "completion"}: what was sampled from (of a conversation, or with --data.chat, its
messages) and the best completion, with its `reward`, the `rewards` of all n, and `tools` and the other columns that no
format reads (docs/data.md). A completion that reached max_tokens is not chosen, unless --keep_cut: fine-tuning
would teach the model to end there. With --above neither is one whose reward is not above it. A prompt of which nothing
is chosen has no line; where that is every prompt, the script ends with an error. DIRECTORY/judged.jsonl has all
completions: the same command with another --keep_cut or --above chooses again, and samples nothing.

The table at the end gives the expected reward of the best of 1, 2, 4 .. n, each from all subsets of the n rewards, and
a bound of its KL to the policy, log n - (n - 1)/n nats a completion (arXiv:2401.01879). An interrupted run goes on with
the next prompts.

Reached: stories260k, the first command with --sampling.max_tokens 200: expected reward 0.263 0.410 0.565 0.710 0.833 of
the best of 1 2 4 8 16, standard errors 0.009 to 0.024. None of these stories ends by itself: --keep_cut chooses them.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from experiments.common import command_line, models, runs, settings
from experiments.common.records import append_lines, as_lines, judged_prompts, read_lines
from experiments.common.rewards import check_compared, load_score, read_rewards
from experiments.common.sampling import make_sampling
from experiments.common.settings import MeshShape, Rare, Reward, Sampling, Weights
from experiments.common.verifiers import VERIFIERS
from rljax.data.examples import answer
from rljax.data.formats import other_columns
from rljax.models import decoder
from rljax.ops.pass_at_k import best_of_n_kl, expected_best, powers_of_two
from rljax.rewards.pool import Pool
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, table, write_atomically
from rljax.train.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    """Completions of a model, the best of each prompt kept."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str | tuple[str, ...]  # files of rows, whose fields are the columns of a prompt
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: settings.Rows = settings.Rows()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    rewards: tuple[str, ...] = ("number",)  # NAME or NAME=WEIGHT each; see docs/rewards.md
    reward: Reward = Reward()
    n: int = 16  # completions per prompt
    above: float | None = None  # choose only completions whose reward is above this
    keep_cut: bool = False  # choose completions too that reached max_tokens
    prompts_at_once: int = 16  # prompts whose completions are sampled together
    seed: int = 0  # of sampling
    sampling: Sampling = Sampling(max_tokens=128)
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape(fsdp=1, tensor=-1)
    directory: str = ""  # of the run; default runs/best_of_n/nN-MODEL-PROMPTS-seedSEED
    debug: bool = False  # without jit, with NaN checks


def main(cfg: Config, verifiers: dict = VERIFIERS) -> list[dict[str, float]]:
    """Sample, judge and choose; return the rows of the table: n, KL bound, reward and its standard error."""
    if cfg.n < 1 or cfg.prompts_at_once < 1:
        raise ValueError(f"n = {cfg.n}, prompts_at_once = {cfg.prompts_at_once}; legal: at least 1 each")
    runs.check_whole_prompts(cfg)
    models.check_not_trained(cfg.weights)
    check_compared(cfg, {"n": cfg.n})
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward)
    mesh = make_mesh(**cfg.mesh.sizes)

    # -- model and data
    tokenizer, prompts = runs.read_all_prompts(cfg, rewards.verifiers)
    context = prompts.length + cfg.sampling.max_tokens
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context)
    lm = decoder.language_model(config)
    sampling = make_sampling(cfg.sampling, cfg.n, tokenizer, config.vocab_size)

    # -- sample, judge, choose
    directory = cfg.directory or f"runs/best_of_n/{runs.name_of(cfg, f'n{cfg.n}')}"
    kept = runs.settings_but(cfg, "above", "keep_cut")  # which choose among what is sampled: they may change
    run = runs.make_run_of_one_step(cfg, directory, kept, __file__, rewards.verifiers)
    with run, Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        score = load_score(rewards, tokenizer, pool, mesh, cfg.weights.dtype, run.directory)
        log = run.directory / "judged.jsonl"
        done = {record["number"]: record for record in read_lines(log)}
        for rows in prompts.batches(cfg.prompts_at_once):
            if done.keys() >= set(rows.number.tolist()):
                continue
            traj = score(sample(lm, params, frozen, rows, sampling, cfg.seed, step=0), rows)
            new = judged_prompts(traj, rows, tokenizer.decode)
            append_lines(log, [record for record in new if record["number"] not in done])
            done = {record["number"]: record for record in new} | done
            log_info(f"{len(done)} of {len(prompts)} prompts")
        records = [done[number] for number in range(len(prompts))]
        chosen = [row for record in records if (row := choose(record, cfg.above, cfg.keep_cut)) is not None]
        write_atomically(run.directory / "chosen.jsonl", as_lines(chosen))
        log_info(f"written: {run.directory / 'chosen.jsonl'}, {len(chosen)} rows of {len(prompts)} prompts")
    found = gains(records, cfg.n)
    table("the best of n", found)
    if not chosen:
        raise ValueError(f"no completion is chosen: {why_none(records, cfg.above)}")
    return found


# --------------------------------------------------------------------------------------------------------- one prompt


def choose(record: dict, above: float | None, keep_cut: bool) -> dict | None:
    """The row to fine-tune on, of a line of judged.jsonl: its best completion, the first of equal ones; or None."""
    legal = [
        i
        for i, reward in enumerate(record["rewards"])
        if reward is not None and (above is None or reward > above) and (keep_cut or record["ended"][i])
    ]
    if not legal:
        return None
    best = max(legal, key=lambda i: record["rewards"][i])
    completion = answer(record["prompt"], record["completions"][best])
    row = {"prompt": record["prompt"], "completion": completion, "reward": record["rewards"][best]}
    return other_columns(record["columns"]) | row | {"rewards": record["rewards"]}


def why_none(records: list[dict], above: float | None) -> str:
    """What kept the completions of all prompts from being chosen, and what would be legal."""
    judged = [
        (reward, ended)
        for record in records
        for reward, ended in zip(record["rewards"], record["ended"], strict=True)
        if reward is not None
    ]
    best = max((reward for reward, _ in judged), default=None)
    if best is None:
        return "none could be judged"
    if above is not None and best <= above:
        return f"the best reward is {best:g}; legal: --above less than that"
    ended = sum(ended for _, ended in judged)
    return f"{ended} of {len(judged)} ended before max_tokens; legal: --keep_cut, or more --sampling.max_tokens"


# --------------------------------------------------------------------------------------------------------- all prompts


def gains(records: list[dict], n: int) -> list[dict[str, float]]:
    """For k = 1, 2, 4 .. n the expected reward of the best of k, over prompts all of whose completions were judged."""
    rewards = np.array([record["rewards"] for record in records if None not in record["rewards"]]).reshape(-1, n)
    if not len(rewards):
        return []
    rows = []
    for k in powers_of_two(n):
        best = np.asarray(expected_best(jnp.asarray(rewards), k))
        error = best.std(ddof=1) / len(best) ** 0.5 if len(best) > 1 else math.nan
        rows.append({"n": k, "KL at most": best_of_n_kl(k), "reward": float(best.mean()), "error": float(error)})
    return rows


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
