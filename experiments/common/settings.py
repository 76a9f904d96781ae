"""Blocks of settings, which recipes nest in their Config: `--batches.prompts 64` on the command line.

A `Rare` setting is a flag like any other, but `--help` leaves it out: its line here is its description.
"""

import dataclasses
import sys
from typing import Annotated, Literal, TypeVar

import jax
import tyro

from rljax.train.mesh import AXES
from rljax.train.trackers import OPENERS

T = TypeVar("T")
# Settings that a resumed run may change: where arrays lie and how work is cut, and where, how patiently and how often
# others are asked and files are written. None of them says what is learned.
PLACEMENT = ("mesh", "micro_batches", "remat", "offload", "gather_for_generation")
LOGISTICS = (
    "server.url",
    "reward.workers",
    "reward.server_requests",
    "reward.server_retries",
    "reward.server_timeout_seconds",
    "reward.server_step_seconds",
    "reward.max_failed",
    "max_failed",
    "save_every",
    "log_samples_every",
)
Rare = tyro.conf.Suppress if {"-h", "--help"} & set(sys.argv) else Annotated[T, "rare"]


@dataclasses.dataclass(frozen=True)
class Batches:
    """One step: prompts x num_generations rows, learned from in epochs x minibatches optimizer updates."""

    prompts: int = 32  # prompts per step
    num_generations: int = 8  # completions per prompt: the group, G
    oversample: int = 1  # prompts sampled for each one kept; groups whose rewards differ are kept first
    filter_groups: Rare[bool] = False  # groups of equal rewards count in no divisor and have no KL term
    carry_over: Rare[int] = 0  # prompts whose unfinished completions continue in the next step; 0: none
    epochs: int = 1  # passes over the rows of a step
    minibatches: int = 1  # number of optimizer updates in a pass, each on its share of the rows
    micro_batches: int = 0  # number of pieces of an update; the gradient does not depend on it; 0: chosen from sizes
    max_tokens_per_device: int = 0  # pack rows: tokens on a device at a time, instead of micro_batches; 0: no packing
    packed_length: Rare[int] = 0  # tokens of a packed row; 0: as long as a sampled row


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    temperature: float = 1.0  # of the softmax, in sampling and in the trainer's log-probs; 0: greedy, not in training
    top_k: int | None = None  # sample from the k most likely tokens
    top_p: float | None = None  # sample from the most likely tokens that hold this probability together
    min_p: Rare[float | None] = None  # sample from tokens at least this likely, relative to the most likely one
    repetition_penalty: Rare[float | None] = None  # earlier tokens' positive logits are divided by it; not in training
    min_tokens: Rare[int | None] = None  # of a completion before it can stop; in training with top_k, top_p, min_p only
    stop_strings: tuple[str, ...] = ()  # texts that end a completion; \n is a new line
    max_tokens: int = 64  # tokens of a completion
    max_concurrent: Rare[int | None] = None  # rows sampled at a time, refilled as they finish; default: all at once
    support: Rare[int] = 64  # most tokens that top_p and min_p keep in training: their ids go with each token sampled


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW after clipping by global norm."""

    learning_rate: float = 3e-4  # its maximum
    warmup_steps: int = 5  # optimizer updates of linear increase to the maximum
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the increase; cosine and linear end at 0
    max_grad_norm: float = 1.0  # largest global norm of the gradient
    weight_decay: Rare[float] = 0.0  # AdamW's, of matrices only: neither norms nor biases
    beta2: Rare[float] = 0.99  # decay of the second moment


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA: only the adapter is trained, and the reference is the model without it."""

    rank: int = 0  # rank of the matrices added; 0: no adapter, the whole model is trained
    alpha: float = 32.0  # the adapter is scaled by alpha/rank, with use_rslora by alpha/√rank
    targets: Rare[tuple[str, ...]] = ("attention/", "mlp/")  # regular expressions of paths (layers/3/attention/query)
    use_rslora: Rare[bool] = False  # rank-stabilized scaling
    use_dora: Rare[bool] = False  # DoRA


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the model's weights are stored, computed with and trained."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, and of an adapter's base
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes, to save memory
    scan_layers: Rare[bool] = (
        False  # layers as one loop: deep models compile in a fraction of the time, small ones slow
    )
    batch_invariant: Rare[bool] = False  # sampler and trainer agree to the bit; refused where this machine cannot
    adapter: Adapter = Adapter()
    freeze: Rare[tuple[str, ...]] = ()  # regular expressions of paths (decoder/layers/3/mlp/up) that are not trained
    offload: Rare[tuple[Literal["opt_state", "frozen"], ...]] = ()  # kept in the host's memory between uses
    gather_for_generation: Rare[bool] = False  # a copy for each rollout, gathered over --mesh.fsdp: fast, if it fits
    ref_sync_steps: Rare[int] = 0  # steps between updates of the reference from the policy; 0: never
    ref_mixup_alpha: Rare[float] = 1.0  # share of the policy in the updated reference


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows become token ids."""

    chat: bool = False  # a text is a user's message, and the model answers in its chat template
    system: Rare[str] = ""  # system message that conversations begin with, unless they have their own
    overlong: Rare[Literal["drop", "cut_left", "cut_right", "error"]] = "drop"  # what becomes of a row that is too long


@dataclasses.dataclass(frozen=True)
class PromptData(Rows):
    """How rows become prompts, and which are drawn."""

    min_pass_rate: Rare[float] = 0.0  # prompts of which a smaller share of completions passes are left out
    max_pass_rate: Rare[float] = 1.0  # and those of a larger one; a completion passes where its first score is above 0
    curriculum_steps: Rare[int] = (
        0  # steps in which the least pass rate falls from (at most) 1/2 to min_pass_rate; 0: at once
    )
    skip_epochs: Rare[int] = 3  # epochs after which a prompt that was left out is drawn again


@dataclasses.dataclass(frozen=True)
class Data(Rows):
    """The rows to learn from, in TRL's dataset formats (docs/data.md)."""

    files: tuple[str, ...] = ()  # jsonl, json, parquet, hf://OWNER/NAME; FILE=WEIGHT: its share of the draws
    template: str = ""  # text of the prompt from other columns, in braces; \n is a new line; @FILE: read from there
    completion: str = ""  # text of the completion from other columns, likewise
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt; 0: what the context leaves
    max_tokens: int = 0  # tokens of a row, prompt and completion; 0: the model's context
    eval_size: int = 64  # rows held out for evaluation, at most half of all; equal prompts are on one side


@dataclasses.dataclass(frozen=True)
class Controllers:
    """Coefficients that follow a measurement, step by step. Without a target a coefficient stays as it is."""

    kl_target: Rare[float | None] = None  # KL to the reference, nats a sequence, that kl_coef is changed towards
    kl_horizon: Rare[int] = 10_000  # completions in which kl_coef follows; smaller is faster
    entropy_target: Rare[float | None] = None  # nats a token; below it an entropy bonus grows, above it there is none
    entropy_delta: Rare[float] = 5e-3  # by which the bonus's coefficient changes in a step


@dataclasses.dataclass(frozen=True)
class Reward:
    """How completions are judged: verifiers in their processes, judges and reward models behind a URL."""

    timeout_seconds: Rare[float] = 5.0  # seconds that a verifier has for one completion
    workers: Rare[int] = 1  # processes that run verifiers
    isolation: Rare[Literal["namespaces", "seccomp", "rlimits"]] = "namespaces"  # of the model's code (SECURITY.md)
    partial_credit: Rare[bool] = False  # code is rewarded with the share of tests that it passes, not for all alone
    max_failed: Rare[float] = 0.5  # share of a rollout that a reward may leave unjudged; beyond it the run stops
    step_separator: Rare[str] = "\\n"  # text that ends a step for a process reward model; \n is a new line
    compare: Rare[Literal["score", "pairwise", "ranking"]] = (
        "score"  # what a judge does with the completions of a prompt
    )
    rubric: Rare[str] = ""  # text file, the question to a judge; default: that of rljax/rewards/judge.py
    scale: Rare[float] = 10.0  # highest score that the rubric allows; a judge's score is divided by it
    judge_model: Rare[str] = ""  # name of the judge at its server; default: the first that is served
    judge_tokens: Rare[int] = 1024  # tokens of a judge's reply
    server_timeout_seconds: Rare[float] = 60.0  # for one request to a server
    server_step_seconds: Rare[float] = 600.0  # for all requests of a step
    server_requests: Rare[int] = 16  # requests in flight
    server_retries: Rare[int] = 2  # further tries of a request that failed


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that samples the completions to learn from, in place of this process (docs/serving.md)."""

    url: Rare[str] = ""  # http://HOST:PORT/v1; default: none
    weights: Rare[Literal["push", "keep"]] = "push"  # sent to it before each step; keep: it has its own
    max_gap: Rare[float] = 1e-3  # nats by which its log-probs may differ; above the default they are corrected for


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices as data x fsdp x sequence x expert x tensor; one of them may be -1: all that are left."""

    data: Rare[int] = 1  # copies of the parameters, each with its share of the rows
    fsdp: int = -1  # devices over which the rows and the parameters of a copy are split
    sequence: Rare[int] = 1  # devices over which the columns of a row are split in scoring and update
    expert: Rare[int] = 1  # devices over which the experts of a mixture are split, and rows
    tensor: int = 1  # devices over which heads, MLP and vocabulary are split
    show_sharding: Rare[bool] = False  # print where each array of the state lies, and its bytes a device; then stop

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of `make_mesh`."""
        return {axis: getattr(self, axis) for axis in AXES}


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of one run, for every script: found under SLURM, Cloud TPU, GKE and Open MPI, else as given."""

    coordinator: Rare[str] = ""  # HOST:PORT of process 0
    processes: Rare[int] = 0  # how many there are; 0: found; 1: this one alone
    process: Rare[int] = -1  # the number of this one, from 0; -1: found
    deadline_seconds: Rare[float] = 300.0  # for all processes to come
    heartbeat_seconds: Rare[int] = 100  # silence of a process after which the others are ended


# Where a script that makes a run sends its metrics too, besides TensorBoard and the report: docs/metrics.md.
Tracker = Rare[Literal["none", *OPENERS]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A simulated panel of annotators (experiments/common/panel.py)."""

    annotators: int = 3  # how many compare each pair
    flip: float = 0.0  # share of votes that are turned round
    temperature: float = 0.0  # of Bradley-Terry: differences of worth below it are seen uncertainly; 0: all are seen
    length_bias: float = 0.0  # worth that a completion gains by 100 tokens
    disagreement: float = 0.0  # standard deviation of an annotator's own taste


def debug_batches(batches: Batches, least_group: int = 1) -> Batches:
    """Two completions, or as many as the algorithm needs, of two prompts, or of one for each device: small enough to
    run without jit. No more completions of a prompt than the settings have."""
    prompts = max(2, jax.device_count())
    return dataclasses.replace(
        batches,
        prompts=prompts,
        num_generations=min(max(2, least_group), batches.num_generations),
        oversample=1,
        carry_over=min(prompts, batches.carry_over * prompts),
        minibatches=1,
        micro_batches=1,
    )


def one_small_step(cfg: T, least_group: int = 1) -> T:
    """The settings of a recipe for --debug: one step of `debug_batches`."""
    return dataclasses.replace(cfg, steps=1, batches=debug_batches(cfg.batches, least_group))
