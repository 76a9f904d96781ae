r"""Human feedback: K completions of each prompt, compared by a person in the terminal, or by a simulated panel.

    python experiments/collect.py --model DIR --prompts prompts.jsonl --out preferences.jsonl
    python experiments/collect.py --model DIR --prompts prompts.jsonl --out preferences.jsonl --n 4 --ask scores
    python experiments/collect.py --model DIR --prompts experiments/story_openings.jsonl --out preferences.jsonl \
        --rewards animals --panel.annotators 3 --panel.flip 0.2

A person ranks the completions of a prompt ("2 1 3", the best first) or scores them ("7 3 5"), leaves one out with an
empty line, and stops with q. With --rewards a panel of annotators compares them, who know these rewards but for their
noise, bias and taste (experiments/common/panel.py has the equation). The file may be appended to at any time: the same
command goes on after its last prompt, with the same completions and votes as if it had never stopped.

A line of --out is a pair: "prompt", "chosen", "rejected", and "margin": the difference of scores, or of the shares of
votes; `tools` and the other columns of the prompt that no format reads go along (docs/data.md). With it are the "votes"
of a panel (true: for the chosen one; equal votes are decided by a coin), the number of the prompt ("row") and of both
completions ("pair"), and whether each of both "ended" by itself: one that was cut at max_tokens gets no end of turn
from dpo.py and reward_model.py, which read the file. Pairs that are worth the same to all are left out. At the end
stand the raw agreement of the panel and Cohen's kappa, of more than two annotators Fleiss'. With --rankings FILE the
completions of each prompt are written there too as one row {"prompt", "completions"}, in the order of the pairs that
they won (of equal ones the first alone), for the losses of rankings in reward_model.py.

Reached: stories260k, story_openings.jsonl, --n 16 --rewards animals --sampling.max_tokens 64: 3,142 comparisons in 51 s
on 2 shared CPU cores; with --panel.flip 0.2 three annotators agree on 67.5% of them, Fleiss' kappa 0.350 (expected of
independent flips: 68%, 0.36).
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.common import command_line, hub, models, runs
from experiments.common.feedback import (
    Candidates,
    compare_by_person,
    end_last_line,
    first_open,
    keep_own_settings,
    line_of,
    own_lines,
    rankings_of,
    report_agreement,
    report_cut,
)
from experiments.common.inputs import inputs_of
from experiments.common.panel import check_panel, votes, worths
from experiments.common.records import append_lines, as_lines, ended_rows
from experiments.common.rewards import Rewards, load_score, read_rewards
from experiments.common.sampling import make_sampling
from experiments.common.settings import MeshShape, Panel, Rare, Reward, Rows, Sampling
from experiments.common.verifiers import VERIFIERS
from rljax.data.examples import prompt_of
from rljax.data.prompts import Prompts
from rljax.data.tokenizer import Tokenizer
from rljax.models import decoder
from rljax.rewards.pool import Pool
from rljax.rewards.score import decode_completions
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, write_atomically
from rljax.train.mesh import make_mesh

FREE = ("out", "rankings", "count", "rows", "mesh", "ask")  # settings that may change when a file is continued


@dataclasses.dataclass(frozen=True)
class Config:
    """Which completions of which prompts are compared, and by whom."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str | tuple[str, ...]  # files of rows, whose fields are the columns of a prompt
    out: str  # jsonl file of preferences, to write or to go on with
    rankings: str = ""  # another jsonl file to write: the completions of each prompt in one row; default: none
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: Rows = Rows()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    count: int = 0  # prompts to collect for; 0: all
    n: int = 2  # completions per prompt; every two of them are compared
    ask: Literal["ranking", "scores"] = "ranking"  # what a person is asked for
    rewards: tuple[str, ...] = ()  # what a panel knows, NAME or NAME=WEIGHT each (docs/rewards.md); none: ask a person
    reward: Reward = Reward()
    panel: Panel = Panel()
    seed: int = 0  # of the order of prompts, of sampling and of votes
    sampling: Sampling = Sampling(max_tokens=128)
    rows: Rare[int] = 64  # completions sampled at a time; all of one prompt are sampled together
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and computation
    mesh: MeshShape = MeshShape(fsdp=1, tensor=-1)


def main(cfg: Config, verifiers: dict = VERIFIERS, ask: Callable[[str], str] = input) -> list[dict]:
    """Collect, and return all lines of the file."""
    if cfg.n < 2:
        raise ValueError(f"n = {cfg.n}; at least 2 completions are compared")
    check_panel(cfg.panel)
    runs.check_whole_prompts(cfg)
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward)
    tokenizer, prompts = runs.read_all_prompts(cfg)
    lines = own_lines(cfg.out)
    settings = {name: value for name, value in hub.settings_of(cfg).items() if name not in FREE}
    keep_own_settings(cfg.out, settings, inputs_of(cfg), lines)
    voters = cfg.panel.annotators if cfg.rewards else 0
    start = first_open(cfg.out, lines, lambda number: prompt_of(prompts.shaped_of([number])[0]), voters)
    end_last_line(cfg.out, lines)
    for candidates in sample_candidates(cfg, tokenizer, prompts, rewards, start):
        found = compare_by_panel(cfg, candidates) if cfg.rewards else compare_by_person(candidates, cfg.ask, ask)
        if found is None:
            break
        append_lines(Path(cfg.out), found)
        lines += found
    log_info(f"{len(lines)} comparisons in {cfg.out}" if lines else f"no comparison was made: {cfg.out} is not written")
    if cfg.rankings:
        write_atomically(Path(cfg.rankings), as_lines(rankings_of(lines)))
    report_cut(lines)
    report_agreement(lines)
    return lines


# ---------------------------------------------------------------------------------------------- prompts and completions


def sample_candidates(
    cfg: Config, tokenizer: Tokenizer, prompts: Prompts, rewards: Rewards, start: int
) -> Iterator[Candidates]:
    """The completions of each prompt from number `start` on; what is sampled beside them does not depend on it."""
    total = min(cfg.count or len(prompts), len(prompts))
    if start >= total:
        return
    context = prompts.length + cfg.sampling.max_tokens
    mesh = make_mesh(**cfg.mesh.sizes)
    config, params = models.load_model(cfg.model, mesh, cfg.dtype, context)
    lm = decoder.language_model(config)
    sampling = make_sampling(cfg.sampling, cfg.n, tokenizer, config.vocab_size)
    size = max(cfg.rows // cfg.n, 1)
    with Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        answers = Path(f"{cfg.out}.answers")
        score = load_score(rewards, tokenizer, pool, mesh, cfg.dtype, answers) if cfg.rewards else None
        for begin in range(start // size * size, total, size):
            rows = prompts.draw(begin, min(size, total - begin))
            traj = sample(lm, params, {}, rows, sampling, cfg.seed, 0)
            traj = traj if score is None else score(traj, rows)
            texts = decode_completions(traj, tokenizer.decode)
            lengths = np.asarray(traj.mask).sum(axis=1)
            ended = ended_rows(traj)
            scores = None if traj.rewards is None else np.asarray(traj.rewards).sum(axis=1)
            for p, number in enumerate(rows.number.tolist()):
                if number >= start:
                    own = slice(p * cfg.n, (p + 1) * cfg.n)
                    known = None if scores is None else scores[own]
                    yield Candidates(number, rows.as_read[p], texts[own], lengths[own], ended[own], known)


# ----------------------------------------------------------------------------------------------------------- comparing


def compare_by_panel(cfg: Config, candidates: Candidates) -> list[dict]:
    """A line for each pair, by the majority of votes. Completions that could not be judged are left out."""
    judged = np.flatnonzero(~np.isnan(candidates.scores))
    number = candidates.number
    worth = worths(candidates.scores[judged], candidates.lengths[judged], cfg.panel, cfg.seed, number)
    lines = []
    for (first, second), for_first in votes(worth, cfg.panel, cfg.seed, number).items():
        i, j = int(judged[first]), int(judged[second])
        balance = 2 * int(for_first.sum()) - len(for_first)
        coin = np.random.default_rng([cfg.seed, number, 2, i, j]).random() < 0.5
        first_wins = balance > 0 or (balance == 0 and coin)
        better, worse = (i, j) if first_wins else (j, i)
        found = {"margin": abs(balance) / len(for_first), "votes": (for_first == first_wins).tolist()}
        lines.append(line_of(candidates, better, worse) | found)
    return lines


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
