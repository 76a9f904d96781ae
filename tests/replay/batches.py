"""TRL's micro-batches as ours. Rows of tokens become trajectories (there the shift happens), micro-batches are padded
to one shape and stacked: the optimizer batch is one, and its rows stand micro-batch after micro-batch.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from rljax.types import Batch, Pairs, Trajectory, trajectory_of_tokens
from tests.golden.preferences import halves
from tests.replay.arguments import Unsupported


def stack(parts: list, rows: int, columns: int):
    """One tree of the trees of micro-batches, each padded to [rows columns ...] with nothing: masks of False."""

    def padded(x):
        x = np.asarray(x)
        missing = [(0, rows - x.shape[0]), (0, columns - x.shape[1])][: x.ndim] if x.ndim else []
        return np.pad(x, missing)

    return jax.tree.map(lambda *leaves: jnp.concatenate([padded(x) for x in leaves]), *parts)


def size(trainer: str, micro: dict) -> tuple[int, int]:
    """(rows, decisions) of our batch made of this micro-batch."""
    if trainer == "grpo":
        rows, prompt = micro["prompt_ids"].shape
        return rows, prompt + micro["completion_ids"].shape[1] - 1
    rows, tokens = micro["input_ids"].shape
    return (rows // 2 if trainer == "dpo" else rows), tokens - 1


# ----------------------------------------------------------------------------------------------------------------- SFT


def sft_segments(micro: dict) -> np.ndarray:
    """1 on tokens, or, where examples are packed without padding, their number."""
    positions, attended = micro.get("position_ids"), micro.get("attention_mask")
    if positions is None:
        return np.ones_like(micro["input_ids"]) if attended is None else attended
    if attended is not None:
        raise Unsupported("a batch with position_ids and attention_mask: packed examples that see each other")
    return np.cumsum(positions == 0, axis=1)


def sft_traj(micro: dict) -> Trajectory:
    tokens, chosen = micro["input_ids"], micro["labels"] != -100
    return trajectory_of_tokens(tokens, sft_segments(micro), chosen, np.zeros(tokens.shape, np.float32))


# ----------------------------------------------------------------------------------------------------------------- DPO


def dpo_pairs(micro: dict) -> Pairs:
    """TRL knows log π_ref of whole answers: it is put on their first tokens."""
    tokens, chosen = micro["input_ids"], micro["completion_mask"] > 0
    if chosen[:, 0].any():
        raise Unsupported("an answer without a prompt: TRL counts its first token in the length, which nobody chose")
    facts = {}
    if "ref_chosen_logps" in micro:
        total = np.concatenate([micro["ref_chosen_logps"], micro["ref_rejected_logps"]])
        first = chosen & (np.cumsum(chosen, axis=1) == 1)
        facts["ref_logp"] = np.where(first, total[:, None], 0.0).astype(np.float32)
    nothing = np.zeros(tokens.shape, np.float32)
    pairs = halves(trajectory_of_tokens(tokens, micro["attention_mask"], chosen, nothing, **facts))
    if not (pairs.chosen.mask.any(axis=1) | pairs.rejected.mask.any(axis=1)).all():
        raise Unsupported("a pair of two empty answers: TRL counts it in the mean, ours does not")
    return pairs


# ---------------------------------------------------------------------------------------------------------------- GRPO

BY_TOKENS_TOLD = ("cispo", "dapo", "vespo")  # loss types that are divided by num_items_in_batch


def require_grpo(micro: dict, args: SimpleNamespace) -> None:
    """Raises Unsupported for a batch that lacks what its loss reads."""
    read = {"ref_per_token_logps": args.beta != 0, "num_items_in_batch": args.loss_type in BY_TOKENS_TOLD}
    if lacking := [key for key, wanted in read.items() if wanted and key not in micro]:
        raise Unsupported(f"loss_type {args.loss_type} with beta = {args.beta} and batches without {lacking}")
    if args.loss_type == "vespo" and "importance_sampling_ratio" in micro:
        raise Unsupported("vespo with importance_sampling_ratio: TRL multiplies it into the ratio of the answer")


def grpo_batch(micro: dict, args: SimpleNamespace, share: float) -> Batch:
    """`share`: the tokens that our mean counts over the tokens that TRL divides by. The importance ratio to another
    sampler is a constant factor of the advantages."""
    tokens = np.concatenate([micro["prompt_ids"], micro["completion_ids"]], axis=1)
    segments = np.concatenate([micro["prompt_mask"], micro["completion_mask"]], axis=1)
    answer = micro["completion_ids"].shape
    own = micro["completion_mask"] * micro.get("tool_mask", 1)

    def whole(x):
        """[B] or [B answer] -> [B tokens]."""
        x = np.asarray(x, np.float32)
        x = np.broadcast_to(x[:, None] if x.ndim == 1 else x, answer)
        return np.pad(x, ((0, 0), (tokens.shape[1] - answer[1], 0)))

    ratio = micro.get("importance_sampling_ratio", np.ones((answer[0], 1)))
    facts = {"temperature": whole(np.full(answer, args.temperature))}
    for ours, theirs in (("old_logp", "old_per_token_logps"), ("ref_logp", "ref_per_token_logps")):
        if theirs in micro:
            facts[ours] = whole(micro[theirs])
    traj = trajectory_of_tokens(tokens, segments, whole(own) > 0, whole(sampler_logp(micro, args)), **facts)
    advantages = (whole(micro["advantages"]) * whole(ratio))[:, 1:]
    extra = {"share": np.full(traj.mask.shape, share, np.float32)}
    return Batch(traj=traj, advantages=advantages, mask=traj.mask, extra=extra)


def sampler_logp(micro: dict, args: SimpleNamespace) -> np.ndarray:
    """What the off-policy mask compares with; the old policy's where there is no other sampler."""
    old = micro.get("old_per_token_logps", np.zeros(micro["completion_ids"].shape))
    sampler = micro.get("sampling_per_token_logps", old)
    if args.off_policy_mask_threshold is not None and np.isnan(sampler * micro["completion_mask"]).any():
        raise Unsupported("NaN in sampling_per_token_logps with off_policy_mask_threshold")
    return sampler


def grpo_shares(window: list[dict], args: SimpleNamespace, alone: bool) -> list[float]:
    """Tokens of our mean over TRL's divisor, of each micro-batch: 1 where a loss is not divided by tokens counted
    before. alone: our mean is one of each micro-batch, divided by their number."""
    for micro in window:
        require_grpo(micro, args)
    if args.loss_type not in BY_TOKENS_TOLD:
        return [1.0] * len(window)
    tokens = [int((m["completion_mask"] * m.get("tool_mask", 1)).sum()) for m in window]
    ours = [len(window) * n for n in tokens] if alone else [sum(tokens)] * len(window)
    part = len(window) / args.steps_per_generation  # of the generation's batch
    return [n / (max(float(m["num_items_in_batch"]), 1.0) * part) for n, m in zip(ours, window, strict=True)]
