"""Tunix's own sampler on its own Llama 3, run by request: a line comes on stdin, one rollout runs, its seconds go out.

    pip install google-tunix                                        # in an environment of its own, Python 3.12
    python experiments/benchmarks/rollout.py --tunix PYTHON         # which starts this with that Python

As fast as it goes: token ids instead of text (a tokenizer that looks prompts up), compiled by the first request, a
cache of just the columns needed, no logits or log-probs returned, top_p = 1 (for which Tunix leaves its sort out). No
token ends an answer. Tunix reads a prompt once for each of its answers.
"""

import json
import sys
import time
import warnings

import jax
import numpy as np
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "prompts",
    "n",
    "length",
    "answer",
)
W1 = dict(zip(SIZES, (4096, 256, 4, 8, 4, 32, 688, 8, 8, 32, 64), strict=True))


class Lookup:
    """A tokenizer whose texts are the numbers of prompts."""

    def __init__(self, prompts: np.ndarray):
        self.prompts = prompts.tolist()

    def encode(self, text: str) -> list[int]:
        return self.prompts[int(text)]

    def decode(self, ids) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # none is put before a prompt

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def make_model(vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size) -> Llama3:
    """Random weights, float32, tied; Tunix's zeros in the MLP made random too."""
    shape = dict(
        vocab_size=vocab_size,
        embed_dim=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )
    rest = dict(head_dim=head_dim, hidden_dim=intermediate_size, rope_theta=10_000, norm_eps=1e-5, weight_tying=True)
    model = Llama3(ModelConfig(**shape, **rest), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    fill = lambda x: x if x.any() else jax.numpy.asarray(0.02 * random.normal(size=x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(fill, nnx.state(model)))
    return model


def main(prompts: int, n: int, length: int, answer: int, **shape) -> None:
    model, vocab_size = make_model(**shape), shape["vocab_size"]
    tokens = np.random.default_rng(0).integers(1, vocab_size, (prompts, length))
    cache = CacheConfig(length + answer, shape["num_layers"], shape["num_kv_heads"], shape["head_dim"])
    sampler = Sampler(model, Lookup(tokens), cache)
    names = [str(i) for i in range(prompts) for _ in range(n)]
    settings = dict(max_prompt_length=length, eos_tokens=[-1], temperature=1.0, top_p=1.0)
    for seed, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        out = sampler(names, answer, seed=seed, **settings)
        seconds = time.perf_counter() - began
        if {len(tokens) for tokens in out.tokens} != {answer}:
            raise ValueError(f"answers of other lengths than {answer} tokens")
        print(seconds, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main(**(json.loads(sys.argv[1]) if len(sys.argv) > 1 else W1))
