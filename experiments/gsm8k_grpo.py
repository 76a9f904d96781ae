r"""GRPO on grade-school mathematics (GSM8K) for a slice of 8 or 16 chips: Qwen2.5-0.5B-Instruct or Qwen3-0.6B.

    python experiments/gsm8k_grpo.py                                   # from the hub; needs pip install 'rljax[data]'
    python experiments/gsm8k_grpo.py --model Qwen/Qwen3-0.6B --sampling.max_tokens 2048   # it thinks before it answers
    python experiments/gsm8k_grpo.py --model DIR --prompts gsm8k_train.jsonl              # what is already on disk

This is grpo.py with the settings below, so every flag of grpo.py is one here too. A step samples 1,024 completions,
128 a chip on 8 chips, and learns from them in four updates; 58 steps are an epoch. On several hosts the same command
runs on each of them (docs/scale.md), and the same command again resumes.

A completion is rewarded 1 where its final number is the answer's, and 0.1 more where that number stands in a box at its
end, as the prompt asks: a right number in a completion that was cut off is luck.

Accuracy is measured on the test split, which training never sees, before and after:

    python experiments/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct \
        --prompts hf://openai/gsm8k/main:test --data.chat \
        --template "{question}\nPlease reason step by step, and put your final answer within \boxed{{}}." \
        --rewards number --n 4 --sampling.max_tokens 512
    python experiments/evaluate.py --model runs/gsm8k_grpo/RUN/model ...    # the rest as before

What preflight.py compiled for v5e:2x4 (--mesh.fsdp 8, prompts of up to 512 tokens, scanned layers), GiB a device of 16:
prefill 1.66, rollout 4.35, scoring 5.25, update 5.53. It bounds a step by 13.8 s at the published peaks, most of it on
the interconnect; decoding gathers the weights for every token. By its formulas alone: 7.2 s, and 5.4 s with
--mesh.data 4 --mesh.fsdp 1 --mesh.tensor 2.

Reached: not yet run on hardware.
"""

import dataclasses
import re

from experiments import grpo
from experiments.common import command_line, runs
from experiments.common.settings import Batches, Optimizer, PromptData, Sampling, Weights

TEMPLATE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclasses.dataclass(frozen=True)
class Config(grpo.Config):
    """GRPO on GSM8K, on a slice of 8 or 16 chips."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # OWNER/NAME on the hub, or a directory
    prompts: str | tuple[str, ...] = "hf://openai/gsm8k/main:train"  # rows with the columns question and answer
    template: str = TEMPLATE  # text of a prompt, columns in braces; \n is a new line; @FILE: read from there
    data: PromptData = PromptData(chat=True)
    rewards: tuple[str, ...] = ("number", "boxed=0.1@number")  # NAME or NAME=WEIGHT each; see docs/rewards.md
    steps: int = 116  # steps: sample, score, update
    kl_coef: float = 0.001  # coefficient of the KL to the reference
    batches: Batches = Batches(prompts=128, num_generations=8, minibatches=4)
    sampling: Sampling = Sampling(max_tokens=512)
    optimizer: Optimizer = Optimizer(learning_rate=1e-6, warmup_steps=10)
    weights: Weights = Weights(dtype="bfloat16", remat="full")
    eval_prompts: int = 256  # prompts held out for evaluation
    eval_every: int = 20  # steps between evaluations, the best model is kept
    save_every: int = 10  # steps between checkpoints
    directory: str = ""  # of the run; default runs/gsm8k_grpo/MODEL-PROMPTS-seedSEED


def boxed(completion: str) -> float:
    """1.0 if the completion ends with a box that holds something, else 0.0; behind it only signs and white space."""
    return float(re.search(r"\\boxed\{[^{}]+\}\W*$", completion) is not None)


def main(cfg: Config) -> dict[str, dict[str, float]]:
    """Train; return reward and KL on the held-out prompts before and after."""
    directory = cfg.directory or f"runs/gsm8k_grpo/{runs.name_of(cfg)}"
    return grpo.main(dataclasses.replace(cfg, directory=directory), verifiers=grpo.VERIFIERS | {"boxed": boxed})


if __name__ == "__main__":
    command_line.run(Config, main)
