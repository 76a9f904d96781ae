"""Record what transformers computes (float32, eager attention, CPU) for test_decoder.py. Needs the parity extra.

python tests/models/record.py --stories DIR      # DIR: a copy of stories260k
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "recorded"
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play"
EVERY = 8  # th token of the vocabulary of stories260k is kept


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids) -> np.ndarray:
    return model(torch.tensor(np.asarray(ids)[None])).logits[0].numpy()


def record_tiny() -> None:
    out = {}
    for case in tiny.CASES:
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny.make(Path(directory), case))
            for i, ids in enumerate(tiny.tokens_of(case)):
                out[f"{case}/{i}"] = logits(model, ids)
    np.savez_compressed(OUT / "tiny.npz", **out)


def record_stories(directory: str) -> None:
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(TEXT)["input_ids"]
    greedy = model.generate(torch.tensor([ids[:1]]), max_new_tokens=40, do_sample=False)[0, 1:]
    out = {"tokens": np.int16(ids), "logits": logits(model, ids)[:, ::EVERY], "greedy": np.int16(greedy.numpy())}
    np.savez_compressed(OUT / "stories260k.npz", text=TEXT, every=EVERY, **out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True)
    record_tiny()
    record_stories(parser.parse_args().stories)
