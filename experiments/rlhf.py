r"""RLHF from end to end: demonstrations, supervised fine-tuning, comparisons, a reward model, reinforcement.

    python experiments/rlhf.py --model DIR                          # run it again and it goes on where it stopped
    python experiments/rlhf.py --model DIR --algorithm rloo         # the first four stages are shared

Every stage is one of the other scripts, and its output the next one's input; here the data is made from what the model
writes and a rule, so that the whole road can be walked with any small model that tells stories:

    pretrained/     completions of the story openings; their first three sentences, with an end, are demonstrations
    sft/            sft.py on these: the style is a story of three sentences that ends
    comparisons/    completions of the fine-tuned model; of two of an opening the one is preferred that names more
                    different animals (--rule), and equal ones are no comparison
    reward_model/   reward_model.py on these comparisons
    ppo/            ppo.py from the fine-tuned model against the reward model; with --algorithm grpo.py, or dpo.py on
                    the comparisons themselves

Half of the openings are held out from every stage; the last line is the reward of 256 stories that begin with these.
Of the others the comparisons of eight are held out from the reward model, whose accuracy is measured on them. Most
stories reach max_tokens: they are compared as they are, without an end (docs/data.md, `ended`), and a story's score is
read at its last token, as PPO reads it. DIRECTORY/config.json keeps the settings that the stages share.

Reached: stories260k, seeds 0 1 2, on two cores: accuracy of the reward model on comparisons of eight openings held out
0.962 0.973 0.961; its reward of the fine-tuned model and with PPO -2.73 -> 2.98, -3.16 -> 3.02, -1.82 -> 3.67 (standard
errors below 0.4) at a KL of 8.5 8.6 7.5 nats a story. Seed 0 took 7 min 36 s from its first line to its last. With 64
completions of an opening in place of 256 that accuracy was 0.66. RLOO, GRPO and DPO: docs/rlhf.md.
"""

import dataclasses
import itertools
import random
import re
from pathlib import Path
from typing import Literal

from experiments import best_of_n, dpo, grpo, ppo, reward_model, sft
from experiments.common import command_line, hub, runs
from experiments.common.inputs import inputs_of, keep_settings
from experiments.common.judging import judge_model
from experiments.common.records import as_lines
from experiments.common.settings import Batches, Data, Optimizer, Sampling
from rljax.data.files import read_table
from rljax.data.prompts import train_eval_split
from rljax.train.log import log_info, write_atomically

OPENINGS = str(Path(__file__).with_name("story_openings.jsonl"))
# Of the KL to the fine-tuned model. GRPO's advantages have a deviation of 1, the others are in units of the reward.
KL_COEF = {"ppo": 1.5, "rloo": 1.5, "grpo": 0.2}
HELD_OUT = 8  # openings whose comparisons are held out from the reward model and from DPO
LAST = ("algorithm", "steps", "dpo_steps", "eval_samples", "directory")  # settings of the last stage alone
SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"”]?")


@dataclasses.dataclass(frozen=True)
class Config:
    """A pretrained model, fine-tuned to a style and to a preference."""

    model: str  # directory of a pretrained model that tells stories
    prompts: str = OPENINGS  # jsonl file with a column prompt
    eval_prompts: int = 32  # prompts held out from every stage
    eval_samples: int = 256  # completions to these before and after the last stage
    sentences: int = 3  # of a demonstration
    rule: str = "animals"  # verifier whose greater result is preferred
    n: int = 16  # completions per prompt that demonstrations are made of
    compared: int = 256  # completions per prompt that are compared
    comparisons: int = 400  # comparisons per prompt, of those the rule can tell apart
    max_tokens: int = 80  # of a completion
    batch_size: int = 64  # demonstrations, comparisons or completions per step
    sft_steps: int = 60  # updates of the supervised fine-tuning
    reward_steps: int = 160  # updates of the reward model
    algorithm: Literal["ppo", "rloo", "grpo", "dpo"] = "ppo"  # of the last stage
    steps: int = 40  # steps of the last stage
    dpo_steps: int = 60  # updates of the last stage, if that is dpo
    seed: int = 0  # of everything
    directory: str = ""  # of all stages; default runs/rlhf/MODEL-seedSEED


def main(cfg: Config) -> dict[str, dict[str, float]]:
    """Walk the road; return the reward and the KL to the fine-tuned model before and after the last stage."""
    runs.check_evaluation(cfg)
    root = Path(cfg.directory or f"runs/rlhf/{hub.model_name(cfg.model)}-seed{cfg.seed}")
    tuned, preferences = compare_completions(cfg, root)
    log_info("== reward model")
    learn_rewards(cfg, tuned, preferences, root / "reward_model")
    log_info(f"== {cfg.algorithm}")
    judge = str(root / "reward_model" / "model")
    if cfg.algorithm == "dpo":
        return learn_from_comparisons(cfg, tuned, preferences, judge, root / "dpo")
    return reinforce(cfg, tuned, judge, root / cfg.algorithm)


def compare_completions(cfg: Config, root: Path) -> tuple[str, str]:
    """The stages before the reward model; the directory of the fine-tuned model, and the file of comparisons.

    Raises ValueError where the stages are there and have other settings: the files between them would be others.
    """
    settings = runs.settings_but(cfg, *LAST)
    keep_settings(root / "config.json", settings, inputs_of(cfg), f"{root} holds stages", "--directory")
    openings = write_rows(root / "openings.jsonl", openings_to_train_on(cfg))
    log_info("== demonstrations and supervised fine-tuning")
    write_completions(cfg, cfg.model, openings, cfg.n, root / "pretrained")
    demonstrations = first_sentences(read_judged(root / "pretrained"), cfg.sentences)
    fine_tune(cfg, write_rows(root / "demonstrations.jsonl", demonstrations), root / "sft")

    log_info("== comparisons")
    tuned = str(root / "sft" / "model")
    write_completions(cfg, tuned, openings, cfg.compared, root / "comparisons")
    preferences = comparisons(read_judged(root / "comparisons"), cfg.comparisons, cfg.seed)
    return tuned, write_rows(root / "preferences.jsonl", preferences)


# -------------------------------------------------------------------------------------------------------------- stages


def write_completions(cfg: Config, model: str, prompts: str, n: int, directory: Path) -> None:
    """n completions of each prompt, judged by the rule: DIRECTORY/judged.jsonl."""
    settings = best_of_n.Config(
        model=model,
        prompts=prompts,
        rewards=(cfg.rule,),
        n=n,
        keep_cut=True,  # what goes on from here is judged.jsonl
        sampling=Sampling(max_tokens=cfg.max_tokens),
        seed=cfg.seed,
        directory=str(directory),
    )
    best_of_n.main(settings)


def fine_tune(cfg: Config, demonstrations: str, directory: Path) -> None:
    """The pretrained model on demonstrations."""
    data = Data(files=(demonstrations,))
    sft.main(sft.Config(cfg.model, data, steps=cfg.sft_steps, **offline(cfg, directory)))


def learn_rewards(cfg: Config, model: str, preferences: str, directory: Path) -> dict[str, dict[str, float]]:
    """A reward model, which begins as the fine-tuned model; its accuracy before and after."""
    data = preference_data(cfg, preferences)
    return reward_model.main(reward_model.Config(model, data, steps=cfg.reward_steps, **offline(cfg, directory)))


def preference_data(cfg: Config, preferences: str) -> Data:
    """The comparisons, of which those of `HELD_OUT` openings are held out."""
    return Data(files=(preferences,), eval_size=HELD_OUT * cfg.comparisons)


def offline(cfg: Config, directory: Path) -> dict:
    """Settings that the stages on files share."""
    optimizer = Optimizer(learning_rate=1e-3, schedule="cosine")
    return dict(batch_size=cfg.batch_size, optimizer=optimizer, seed=cfg.seed, directory=str(directory))


def learn_from_comparisons(
    cfg: Config, model: str, preferences: str, judge: str, directory: Path
) -> dict[str, dict[str, float]]:
    """DPO on the comparisons, from the fine-tuned model; judged like the methods that learn from the reward model."""
    settings = offline(cfg, directory) | dict(optimizer=Optimizer(learning_rate=1e-4, schedule="cosine"))
    dpo.main(dpo.Config(model, preference_data(cfg, preferences), steps=cfg.dpo_steps, **settings))
    sampled = grpo.Config(**online(cfg, model, judge, directory))
    tuned = directory / "model"
    return runs.summarize(sampled, judge_model(sampled, model), judge_model(sampled, str(tuned)), tuned)


def online(cfg: Config, model: str, judge: str, directory: Path) -> dict:
    """Settings that the stages share whose completions the reward model judges; the rule is recorded, with weight 0."""
    return dict(
        model=model,
        prompts=cfg.prompts,
        rewards=(judge, f"{cfg.rule}=0"),
        steps=cfg.steps,
        sampling=Sampling(max_tokens=cfg.max_tokens),
        optimizer=Optimizer(learning_rate=3e-4),
        eval_prompts=cfg.eval_prompts,
        eval_samples=cfg.eval_samples,
        seed=cfg.seed,
        directory=str(directory),
    )


def reinforce(cfg: Config, model: str, judge: str, directory: Path) -> dict[str, dict[str, float]]:
    """The fine-tuned model against the reward model."""
    shared = online(cfg, model, judge, directory)
    if cfg.algorithm == "ppo":
        batches = Batches(prompts=cfg.batch_size, num_generations=1, epochs=2, minibatches=2)
        critic = dict(critic="separate", critic_model=judge, ppo=ppo.Ppo(kl_coef=KL_COEF["ppo"]))
        return ppo.main(ppo.Config(batches=batches, **critic, **shared))
    batches = Batches(prompts=cfg.batch_size // 4, num_generations=4)
    kl = dict(kl_coef=KL_COEF[cfg.algorithm], kl_in_reward=cfg.algorithm == "rloo")
    return grpo.main(grpo.Config(algorithm=cfg.algorithm, batches=batches, **kl, **shared))


# ------------------------------------------------------------------------------------------------- the data in between


def openings_to_train_on(cfg: Config) -> list[dict]:
    """The prompts that ppo.py and grpo.py do not hold out. Raises ValueError for a row whose prompt is no text."""
    table = read_table(cfg.prompts)
    for i, row in enumerate(table.rows):
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"{table.place(i, 'prompt')}: {row.get('prompt')!r}; legal: a text")
    train, _ = train_eval_split([row["prompt"] for row in table.rows], cfg.eval_prompts, cfg.seed)
    return [table.rows[i] for i in train]


def first_sentences(judged: list[dict], count: int) -> list[dict]:
    """A demonstration of each completion that has so many sentences, which are its completion."""
    rows = []
    for record in judged:
        for completion in record["completions"]:
            sentences = SENTENCE.findall(completion)[:count]
            if len(sentences) == count:
                rows.append({"prompt": record["prompt"], "completion": "".join(sentences)})
    return rows


def comparisons(judged: list[dict], most: int, seed: int) -> list[dict]:
    """Two completions of a prompt whose rewards differ, at most so many times for each prompt, at random.

    A completion without a reward, which the rule left unjudged, is not compared.
    """
    rows = []
    for record in judged:
        completions = zip(record["rewards"], record["completions"], record["ended"], strict=True)
        pairs = itertools.combinations([one for one in completions if one[0] is not None], 2)
        told_apart = [sorted(pair, reverse=True) for pair in pairs if pair[0][0] != pair[1][0]]
        random.Random(f"{seed} {record['number']}").shuffle(told_apart)
        for (_, chosen, ended), (_, rejected, other_ended) in told_apart[:most]:
            pair = {"chosen": chosen, "rejected": rejected, "ended": [ended, other_ended]}
            rows.append({"prompt": record["prompt"], **pair})
    return rows


def read_judged(directory: Path) -> list[dict]:
    """The lines that best_of_n.py left, in the order of the prompts."""
    return sorted(read_table(directory / "judged.jsonl").rows, key=lambda record: record["number"])


def write_rows(path: Path, rows: list[dict]) -> str:
    """A jsonl file of these rows; its path."""
    if not rows:
        raise ValueError(f"{path}: no row to write; legal: other prompts, more completions or longer ones")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_lines(rows))
    log_info(f"{path}: {len(rows)} rows")
    return str(path)


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
