"""Record what transformers computes (float32, eager attention, CPU) for test_decoder.py. Needs the parity extra.

python tests/models/record.py --stories DIR      # DIR: a copy of stories260k
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import tiny
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play"
EVERY = 8  # th token of the vocabulary of stories260k is kept


def load(directory):
    """The model. Raises ValueError unless the directory holds exactly its tensors."""
    model, told = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    if any(told.values()):
        raise ValueError(f"{directory}: {told}")
    return model.eval()


@torch.no_grad()
def logits(model, ids) -> np.ndarray:
    return model(torch.tensor(np.asarray(ids)[None])).logits[0].numpy()


def stored(config: dict) -> dict[str, list]:
    """The tensors that transformers writes for this config.json, as tiny.shapes_of reads them."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
        with safe_open(Path(directory) / "model.safetensors", framework="numpy") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    found = {}
    for name, shape in sorted(shapes.items()):
        numbers = re.findall(r"\d+", name)
        kept = found.setdefault(re.sub(r"\d+", "#", name), [shape, *({} for _ in numbers)])
        if kept[0] != shape:
            raise ValueError(f"{name} has shape {shape}, others like it {kept[0]}")
        for seen, number in zip(kept[1:], numbers, strict=True):
            seen[int(number)] = True
    return {name: [shape, *map(sorted, numbers)] for name, (shape, *numbers) in found.items()}


def record_tiny() -> None:
    shapes = {name: stored(tiny.config_of(name)) for name in tiny.CASES}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(listed)}" for name, listed in shapes.items())
    (tiny.RECORDED / "shapes.json").write_text(f"{{\n{lines}\n}}\n")
    out = {}
    for name in tiny.CASES:
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny.make(Path(directory), name))
            for i, ids in enumerate(tiny.tokens_of(name)):
                out[f"{name}/{i}"] = logits(model, ids)
    np.savez_compressed(tiny.RECORDED / "tiny.npz", **out)


def record_stories(directory: str) -> None:
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(TEXT)["input_ids"]
    greedy = model.generate(torch.tensor([ids[:1]]), max_new_tokens=40, do_sample=False)[0, 1:]
    out = {"tokens": np.int16(ids), "logits": logits(model, ids)[:, ::EVERY], "greedy": np.int16(greedy.numpy())}
    np.savez_compressed(tiny.RECORDED / "stories260k.npz", text=TEXT, every=EVERY, **out)


if __name__ == "__main__":
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories")
    record_tiny()
    if (stories := parser.parse_args().stories) is not None:
        record_stories(stories)
