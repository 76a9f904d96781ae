"""The rollout of TRL's GRPOTrainer, run by request: a line comes on stdin, one rollout runs, its seconds go out.

    pip install trl                                                 # in an environment of its own, torch for CPUs
    python experiments/benchmarks/rollout.py --trl PYTHON           # which starts this with that Python

What the trainer does from a batch of prompts to the tokens of its answers (`_generate`): tokenizing, padding,
transformers.generate at temperature 1, cutting at the end, decoding to text. No rewards, no log-probs (with KL 0 and
one update a rollout TRL computes none). As fast as it goes: float32, no gradient checkpointing, and an end token that
the model does not have, so that nothing has to keep it from coming early. TRL reads a prompt once for each of its
answers.
"""

import json
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

W1 = dict(
    vocab_size=4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=688
)
W1 |= dict(prompts=8, n=8, length=32, answer=64)


def make_model(
    vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size
) -> LlamaForCausalLM:
    """Random weights, float32, tied."""
    shape = dict(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads
    )
    rest = dict(
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(LlamaConfig(**shape, **rest, eos_token_id=vocab_size))


def numbers(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers below `vocabulary`; the end token comes after them."""
    words = {str(i): i for i in range(vocab_size)} | {"end": vocab_size}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="0")


def main(prompts: int, n: int, length: int, answer: int, **shape) -> None:
    torch.manual_seed(0)
    rows = np.random.default_rng(0).integers(1, shape["vocab_size"], (prompts, length))
    texts = [" ".join(map(str, row)) for row in rows]
    settings = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", beta=0.0)
    sizes = dict(per_device_train_batch_size=prompts * n, num_generations=n, max_completion_length=answer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            make_model(**shape),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(folder, **settings, **sizes),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=numbers(shape["vocab_size"]),
        )
        trainer.model.train()  # as in a training step
        asked = [text for text in texts for _ in range(n)]
        for _ in sys.stdin:
            began = time.perf_counter()
            _, answers, *_ = trainer._generate(asked)
            seconds = time.perf_counter() - began
            if {len(tokens) for tokens in answers} != {answer}:
                raise ValueError(f"answers of other lengths than {answer} tokens")
            print(seconds, flush=True)


if __name__ == "__main__":
    main(**(json.loads(sys.argv[1]) if len(sys.argv) > 1 else W1))
