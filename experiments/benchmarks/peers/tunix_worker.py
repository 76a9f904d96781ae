"""Tunix's own trainers on its own Llama 3, run by request: a line comes on stdin, one unit of work runs, its seconds
go out.

    python experiments/benchmarks/train_step.py --against tunix     # starts this in an environment with google-tunix

Units: `rollout`, what GRPOLearner samples with; `update`, the actor's update on one batch of completions; `grpo_step`,
a whole step of GRPOLearner.train: rollout, rewards, advantages, update; `sft` and `dpo`, a step of PeftTrainer and of
DPOTrainer, which computes the reference's log-probs in every step.

As fast as it goes: float32, AdamW, all rows at once (2, 4 or 8 micro-batches were no faster), no logging and no
checkpoints, no KL term, a KV cache of just the columns needed, no log-probs returned by the sampler, top_p = 1 (for
which Tunix leaves its sort out), token ids instead of text. No token ends a completion. Tunix reads a prompt once for
each of its completions.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils as sft_utils
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig
from tunix.sft.dpo.dpo_trainer import TrainingInput as PreferenceInput
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

NEVER = 10**9  # steps


def requests() -> Iterator[None]:
    """One item for each line that comes; the seconds until the next item is asked for go out."""
    for _ in sys.stdin:
        start = time.perf_counter()
        yield
        print(time.perf_counter() - start, flush=True)


# ------------------------------------------------------------------------------------------------- model and data


def make_model(work: dict) -> Llama3:
    """Random weights, float32, tied; Tunix's zeros in the MLP made random too."""
    config = ModelConfig(
        num_layers=work["num_layers"],
        vocab_size=work["vocab_size"],
        embed_dim=work["hidden_size"],
        hidden_dim=work["intermediate_size"],
        num_heads=work["num_heads"],
        head_dim=work["head_dim"],
        num_kv_heads=work["num_kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)

    def without_zeros(x):
        return x if x.any() else jnp.asarray(0.02 * random.normal(size=x.shape), x.dtype)

    nnx.update(model, jax.tree.map(without_zeros, nnx.state(model)))
    return model


def random_tokens(work: dict, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Token ids, none of which is Tunix's padding, 0."""
    return np.random.default_rng(seed).integers(1, work["vocab_size"], (rows, columns), np.int32)


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


# --------------------------------------------------------------------------------------------------------- GRPO


def make_learner(work: dict) -> GRPOLearner:
    """GRPO without a KL term; rewards are coins."""
    random = np.random.default_rng(0)

    def coins(prompts, completions, **_):
        return random.integers(0, 2, len(completions)).astype(float).tolist()

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    rollout = RolloutConfig(
        max_tokens_to_generate=work["completion"],
        max_prompt_length=work["length"],
        kv_cache_size=work["length"] + work["completion"],
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],
    )
    training = RLTrainingConfig(actor_optimizer=optax.adamw(1e-4), eval_every_n_steps=NEVER, max_steps=NEVER)
    cluster = RLCluster(
        actor=make_model(work),
        tokenizer=Lookup(random_tokens(work, work["prompts"], work["length"])),
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=training,
            rollout_config=rollout,
        ),
    )
    algorithm = GRPOConfig(num_generations=work["n"], num_iterations=1, beta=0.0, epsilon=0.2)
    return GRPOLearner(cluster, algorithm, coins)


def prompt_names(work: dict) -> np.ndarray:
    return np.arange(work["prompts"]).astype(str)


def rollout(work: dict) -> None:
    learner = make_learner(work)
    repeated = np.repeat(prompt_names(work), work["n"]).tolist()
    for _ in requests():
        output = learner.rl_cluster.generate(repeated)
        if {len(tokens) for tokens in output.tokens} != {work["completion"]}:
            raise ValueError(f"completions of other lengths than {work['completion']} tokens")


def update(work: dict) -> None:
    learner = make_learner(work)
    learner._rollout_micro_batch_size = work["prompts"]  # GRPOLearner.train sets it
    repeated = np.repeat(prompt_names(work), work["n"]).tolist()
    batch = learner._generate_and_compute_advantage({"prompts": repeated})
    for _ in requests():
        learner.rl_cluster.update_actor([batch], None)


def grpo_step(work: dict) -> None:
    learner = make_learner(work)
    learner.train({"prompts": prompt_names(work)} for _ in requests())


# ---------------------------------------------------------------------------------------------------- SFT and DPO


def sft(work: dict) -> None:
    """The loss is that of the completions' tokens."""
    trainer = PeftTrainer(make_model(work), optax.adamw(1e-4), TrainingConfig(eval_every_n_steps=NEVER))
    trainer.with_gen_model_input_fn(model_input)
    trainer.is_managed_externally = True  # the trainer stays open after a batch
    tokens = random_tokens(work, work["prompts"] * work["n"], work["length"] + work["completion"])
    chosen = np.broadcast_to(np.arange(tokens.shape[1]) >= work["length"], tokens.shape)
    for _ in requests():
        trainer.train([TrainingInput(tokens, chosen)])


def model_input(batch: TrainingInput) -> dict:
    """As in Tunix's own script for supervised fine-tuning (cli/peft_main.py)."""
    is_text = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": sft_utils.build_positions_from_mask(is_text),
        "attention_mask": sft_utils.make_causal_attn_mask(is_text),
    }


def dpo(work: dict) -> None:
    model = make_model(work)
    reference = make_model(work)
    trainer = DPOTrainer(model, reference, optax.adamw(1e-4), DPOTrainingConfig(eval_every_n_steps=NEVER))
    trainer.is_managed_externally = True
    pairs = work["prompts"] * work["n"] // 2
    prompt = random_tokens(work, pairs, work["length"])
    chosen = random_tokens(work, pairs, work["completion"], seed=1)
    rejected = random_tokens(work, pairs, work["completion"], seed=2)
    batch = PreferenceInput(
        prompt_ids=prompt,
        prompt_mask=np.ones_like(prompt),
        chosen_ids=chosen,
        chosen_mask=np.ones_like(chosen),
        rejected_ids=rejected,
        rejected_mask=np.ones_like(rejected),
    )
    for _ in requests():
        trainer.train([batch])


UNITS = {"rollout": rollout, "update": update, "grpo_step": grpo_step, "sft": sft, "dpo": dpo}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    work = json.loads(sys.argv[1])
    UNITS[work.pop("unit")](work)
