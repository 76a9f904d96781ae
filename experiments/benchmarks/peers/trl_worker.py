"""TRL's own trainers on a Llama of transformers, run by request: a line comes on stdin, one unit of work runs, its
seconds go out.

    python experiments/benchmarks/train_step.py --against trl       # starts this in an environment with trl

Units: `rollout`, what GRPOTrainer does from a batch of prompts to the tokens of its completions (`_generate`:
tokenizing, padding, transformers.generate, decoding to text); `grpo_step`, `sft` and `dpo`, a step of the loop of
GRPOTrainer, SFTTrainer and DPOTrainer; `update`, the same of GRPOTrainer where every step learns from the completions
of the first. DPOTrainer takes the reference's log-probs in every step, its default.

As fast as it goes: float32, the trainer's own AdamW, 4 micro-batches a step, no clipping of gradients, no gradient
checkpointing, no logging and no checkpoints, no KL term (with one update a rollout TRL then computes no log-probs
beside), and an end token that the model does not have, so that nothing has to keep it from coming early. The clock
starts when the batch is at hand. TRL reads a prompt once for each of its completions.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

BATCHES = 16  # different ones, over and over
MICRO_BATCHES = 4  # of a step; with 1 and 8 it took longer


def requests() -> Iterator[None]:
    """One item for each line that comes; the seconds until the next item is asked for go out."""
    for _ in sys.stdin:
        start = time.perf_counter()
        yield
        print(time.perf_counter() - start, flush=True)


class StepByRequest(TrainerCallback):
    """Lets a trainer's loop wait for a request before each step, and end with the requests."""

    def __init__(self):
        self.requests = requests()

    def on_step_begin(self, *_, **__):
        if next(self.requests, self) is self:
            raise SystemExit


# ------------------------------------------------------------------------------------------------- model and data


def make_model(work: dict) -> LlamaForCausalLM:
    """Random weights, float32, tied."""
    config = LlamaConfig(
        vocab_size=work["vocab_size"],
        hidden_size=work["hidden_size"],
        num_hidden_layers=work["num_layers"],
        num_attention_heads=work["num_heads"],
        num_key_value_heads=work["num_kv_heads"],
        head_dim=work["head_dim"],
        intermediate_size=work["intermediate_size"],
        tie_word_embeddings=True,
        eos_token_id=work["vocab_size"],
    )
    return LlamaForCausalLM(config)


def make_tokenizer(vocab_size: int, end: int) -> PreTrainedTokenizerFast:
    """Words w0, w1 ... are the tokens, but for `end`, which is the word "end"; the padding is w0.

    No word is a part of another: "end" and padding are cut out of a text wherever they stand.
    """
    words = {f"w{i:06d}": i for i in range(vocab_size) if i != end} | {"end": end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w000000"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="w000000")


def texts(work: dict, rows: int, words: int, seed: int = 0) -> list[str]:
    """Random words, none of which is padding or an end."""
    tokens = np.random.default_rng(seed).integers(2, work["vocab_size"], (rows, words))
    return [" ".join(f"w{token:06d}" for token in row) for row in tokens]


def require_tokens(ids: list[int], count: int) -> None:
    """Raise ValueError unless there are `count` of them."""
    if len(ids) != count:
        raise ValueError(f"a text has {len(ids)} tokens instead of {count}")


def settings(batch_size: int, folder: str) -> dict:
    """Arguments of every trainer, for steps on `batch_size` rows or pairs."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=batch_size // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=10**6,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


# --------------------------------------------------------------------------------------------------------- GRPO


class Update(GRPOTrainer):
    """Every step learns from the completions of the first."""

    batch = None

    def _generate_and_score_completions(self, inputs):
        self.batch = self.batch or super()._generate_and_score_completions(inputs)
        return dict(self.batch)


def make_grpo_trainer(work: dict, folder: str, trainer: type = GRPOTrainer) -> GRPOTrainer:
    """GRPO without a KL term; rewards are coins."""
    random = np.random.default_rng(0)

    def coins(completions, **_):
        return random.integers(0, 2, len(completions)).astype(float).tolist()

    sizes = dict(num_generations=work["n"], max_completion_length=work["completion"], temperature=1.0)
    prompts = texts(work, BATCHES * work["prompts"], work["length"])
    tokenizer = make_tokenizer(work["vocab_size"], end=work["vocab_size"])  # an end that the model does not have
    require_tokens(tokenizer(prompts[0])["input_ids"], work["length"])
    return trainer(
        make_model(work),
        reward_funcs=coins,
        args=GRPOConfig(**settings(work["prompts"] * work["n"], folder), **sizes, beta=0.0),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[StepByRequest()],
    )


def rollout(work: dict, folder: str) -> None:
    trainer = make_grpo_trainer(work, folder)
    trainer.model.train()  # as in a training step
    prompts = [text for text in texts(work, work["prompts"], work["length"]) for _ in range(work["n"])]
    for _ in requests():
        _, completions, *_ = trainer._generate(prompts)
        if {len(tokens) for tokens in completions} != {work["completion"]}:
            raise ValueError(f"completions of other lengths than {work['completion']} tokens")


def update(work: dict, folder: str) -> None:
    make_grpo_trainer(work, folder, Update).train()


def grpo_step(work: dict, folder: str) -> None:
    make_grpo_trainer(work, folder).train()


# ---------------------------------------------------------------------------------------------------- SFT and DPO


def sft(work: dict, folder: str) -> None:
    """The loss is that of the completions' tokens, TRL's default for prompts and completions. TRL adds the end."""
    batch_size = work["prompts"] * work["n"]
    columns = {
        "prompt": texts(work, BATCHES * batch_size, work["length"]),
        "completion": completions(work, BATCHES * batch_size, seed=1),
    }
    trainer = SFTTrainer(
        make_model(work),
        args=SFTConfig(**settings(batch_size, folder)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=make_tokenizer(work["vocab_size"], end=1),
        callbacks=[StepByRequest()],
    )
    require_tokens(trainer.train_dataset[0]["input_ids"], work["length"] + work["completion"])
    trainer.train()


def dpo(work: dict, folder: str) -> None:
    """Half as many pairs as there are rows."""
    pairs = work["prompts"] * work["n"] // 2
    columns = {
        "prompt": texts(work, BATCHES * pairs, work["length"]),
        "chosen": completions(work, BATCHES * pairs, seed=1),
        "rejected": completions(work, BATCHES * pairs, seed=2),
    }
    model = make_model(work)
    reference = make_model(work)
    reference.load_state_dict(model.state_dict())
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(**settings(pairs, folder)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=make_tokenizer(work["vocab_size"], end=1),
        callbacks=[StepByRequest()],
    )
    require_tokens(trainer.train_dataset[0]["prompt_ids"], work["length"])
    require_tokens(trainer.train_dataset[0]["chosen_ids"], work["completion"])
    trainer.train()


def completions(work: dict, rows: int, seed: int) -> list[str]:
    """Random words that follow a prompt, one fewer than tokens: TRL adds the end."""
    return [" " + text for text in texts(work, rows, work["completion"] - 1, seed)]


UNITS = {"rollout": rollout, "update": update, "grpo_step": grpo_step, "sft": sft, "dpo": dpo}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    work = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        UNITS[work.pop("unit")](work, folder)
