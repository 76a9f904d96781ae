"""What experiments share: blocks of settings, and how a command line becomes them."""

import contextlib
import dataclasses
import hashlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from rljax import types
from rljax.data.prompts import Prompts, from_template, read_jsonl, train_eval_split
from rljax.data.stop_strings import stop_strings
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.models import decoder, hf, policy
from rljax.models.decoder import DecoderConfig
from rljax.models.lora import LoraConfig
from rljax.rewards.score import RewardError
from rljax.train.log import log_info
from rljax.train.mesh import Shardings, data_parallel_size, param_shardings, state_shardings
from rljax.train.packing import make_packed_update
from rljax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW behind a clip of the global norm."""

    learning_rate: float = 3e-4  # at its highest
    warm_up: int = 5  # updates of linear increase before that
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after that; cosine and linear end at 0
    clip_norm: float = 1.0  # largest global gradient norm
    weight_decay: float = 0.0  # AdamW's, of matrices only: neither norms nor biases
    beta2: float = 0.99  # decay of the second moment


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 1.0  # of the softmax; the trainer rescales by it too
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float | None = None  # keep the likeliest tokens that hold this share
    min_p: float | None = None  # keep tokens this likely relative to the likeliest
    repetition_penalty: float | None = None  # divides the logits of tokens seen before, or multiplies negative ones
    min_tokens: int | None = None  # no stop token before an answer has so many
    stop_strings: tuple[str, ...] = ()  # texts that end an answer, wherever they stand; \n is a new line
    max_tokens: int = 64  # of an answer
    max_concurrent: int | None = (
        None  # answers drawn at a time, the next taking the place of a finished one; default: all
    )


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices as data x fsdp x tensor; one of them may be -1: what is left."""

    data: int = 1  # replicas of the parameters
    fsdp: int = -1  # rows and parameters both cut
    tensor: int = 1  # heads, MLP and vocabulary cut


@dataclasses.dataclass(frozen=True)
class Batches:
    """One step: prompts x group rows kept, learnt from in epochs x minibatches updates of micro_batches pieces each."""

    prompts: int = 32  # prompts per step
    group: int = 8  # answers per prompt
    oversample: int = 1  # prompts drawn for each one kept; those whose answers differ in reward are kept first
    wait: int = 0  # prompts a step does not wait for: their unfinished answers go on in the next one; 0: none
    epochs: int = 1  # passes over the rows of a step
    minibatches: int = 1  # updates per pass
    micro_batches: int = 1  # pieces of an update, for memory; the gradient does not depend on it
    pack: int = 0  # tokens on a device at a time, answers side by side in rows, in as many pieces as it takes; 0: off
    pack_width: int = 0  # tokens of a packed row; 0: as sampled


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: only it is trained, and the reference is the model without it."""

    rank: int = 0  # of the products that are added to matrices; 0: no adapter, all is trained
    alpha: float = 32.0  # the adapter weighs alpha/rank, with rank_stabilised alpha/√rank
    targets: tuple[str, ...] = ("attention/", "mlp/")  # patterns of the matrices' paths (layers/3/attention/query)
    use_rslora: bool = False  # rsLoRA
    use_dora: bool = False  # DoRA


# Nats by which log-probs of sampler and trainer may differ with the same parameters: rounding, for the largest logits.
SAMPLER_GAP = {"float32": 1e-3, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Weights:
    """How a model's weights are held, computed with and trained."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, and of an adapter's base
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again
    adapter: Adapter = Adapter()
    freeze: tuple[str, ...] = ()  # patterns of the paths (decoder/layers/3/mlp/up) of what is not trained
    offload: tuple[Literal["opt_state", "frozen"], ...] = ()  # what waits in the host's memory
    reference_every: int = 0  # steps between refreshments of the reference by the policy; 0: it stays as it was
    reference_share: float = 1.0  # of the policy in the refreshed reference


def small(batches: Batches) -> Batches:
    """Two prompts with two answers each: what a step without jit can bear."""
    return dataclasses.replace(batches, prompts=2, group=2, oversample=1, minibatches=1, micro_batches=1)


def optimizer(options: Optimizer, updates: int) -> optax.GradientTransformation:
    """The optax chain, its schedule ending after `updates`."""
    rest = max(updates - options.warm_up, 1)
    after = {
        "constant": optax.constant_schedule(options.learning_rate),
        "cosine": optax.cosine_decay_schedule(options.learning_rate, rest),
        "linear": optax.linear_schedule(options.learning_rate, 0.0, rest),
    }[options.schedule]
    ramp = optax.linear_schedule(options.learning_rate / (options.warm_up + 1), options.learning_rate, options.warm_up)
    rate = optax.join_schedules([ramp, after], [options.warm_up])
    decayed = param_filters.decay_mask if options.weight_decay else None
    adam = optax.adamw(rate, b2=options.beta2, weight_decay=options.weight_decay, mask=decayed)
    return optax.chain(clip_global_norm(options.clip_norm), adam)


def clip_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale gradients whose global norm exceeds `limit` down to it.

    optax.clip_by_global_norm divides 0 by 0 where the gradient is zero (a batch without signal): `--debug` stops there.
    """

    def clip(updates, params=None):
        return optax.tree.scale(limit / jnp.maximum(optax.tree.norm(updates), limit), updates)

    return optax.stateless(clip)


def check_batches(batches: Batches, mesh: jax.sharding.Mesh, waits: bool = False) -> None:
    """Raise one ValueError that lists every number that does not divide, and the legal ones nearest to it.

    waits: whether the experiment carries prompts over (`draws.make_draw`).
    """
    ways = data_parallel_size(mesh)
    rows = batches.prompts * batches.group
    wrong = [
        f"{f.name} = {getattr(batches, f.name)}; at least {min(f.default, 1)}"
        for f in dataclasses.fields(batches)
        if getattr(batches, f.name) < min(f.default, 1)
    ]
    if not wrong:
        if batches.wait and not waits:
            wrong.append(f"wait = {batches.wait}, but no prompt of this experiment goes on in the next step; legal: 0")
        elif batches.wait % ways:
            wrong.append(f"wait = {batches.wait} over {ways} devices (data x fsdp); legal: multiples of {ways}")
        if batches.prompts % ways:
            near = sorted({max(ways, batches.prompts // ways * ways), (batches.prompts // ways + 1) * ways})
            wrong.append(f"prompts = {batches.prompts} over {ways} devices (data x fsdp); nearest legal: {near}")
        micro_batches = 1 if batches.pack else batches.micro_batches
        cuts = batches.minibatches * micro_batches
        legal = [c for c in range(1, rows + 1) if rows % c == 0 and (rows // c) % ways == 0]
        if cuts not in legal:
            near = sorted(sorted(legal, key=lambda c: abs(c - cuts))[:4])
            wrong.append(
                f"prompts x group = {batches.prompts} x {batches.group} = {rows} rows in minibatches x micro_batches = "
                f"{batches.minibatches} x {micro_batches} = {cuts} pieces; nearest legal products: {near}"
            )
    if wrong:
        raise ValueError("batch sizes that do not divide: " + "; ".join(wrong))


def new_lines(text: str) -> str:
    """A text of the command line, where \\n is a new line."""
    return text.replace("\\n", "\n")


def tokenizer(directory: str, vocabulary: int) -> Tokenizer:
    """The tokenizer of a model directory. Raises ValueError where it has more ids than the model."""
    found = load_tokenizer(directory)
    if found.size > vocabulary:
        raise ValueError(f"{directory}: the tokenizer has {found.size} ids, the model {vocabulary}")
    return found


def token_bytes(tokenizer: Tokenizer, vocabulary: int) -> list[bytes]:
    """What each of a model's ids stands for; nothing for those that the tokenizer lacks."""
    known = tokenizer.token_bytes()
    return known + [b""] * (vocabulary - len(known))


def sampling(options: Sampling, n: int, tokenizer: Tokenizer, vocabulary: int) -> types.Sampling:
    """The sampler's settings for n answers a prompt of a model with so many ids, stop strings as an automaton."""
    fields = dataclasses.asdict(options)
    strings = [new_lines(text) for text in fields.pop("stop_strings")]
    automaton = jnp.asarray(stop_strings(strings, token_bytes(tokenizer, vocabulary))) if strings else None
    return types.Sampling(n=n, stop=tokenizer.stop, stop_strings=automaton, **fields)


def updater(make: Callable, batches: Batches, shardings: Shardings, columns: int) -> Callable:
    """The update of these batches, packed where they say so.

    Args: make: (micro_batches=, shardings=) -> update. columns: of a row as sampled; a packed one holds it.
    """

    def make_of(micro_batches: int) -> Callable:
        return make(micro_batches=micro_batches, shardings=shardings)

    if not batches.pack:
        return make_of(batches.micro_batches)
    width = batches.pack_width or columns
    if not columns <= width <= batches.pack:
        raise ValueError(
            f"pack = {batches.pack}, pack_width = {batches.pack_width} (0: as sampled), where rows as sampled have "
            f"{columns} tokens; legal: {columns} <= pack_width <= pack"
        )
    return make_packed_update(make_of, batches.pack, width, shardings)


def read_rewards(names: tuple[str, ...], legal: dict[str, Callable]) -> dict[str, float]:
    """Weights by name from NAME or NAME=WEIGHT. Raises ValueError for a name that is not in `legal`, or no number."""
    weights = {}
    for item in names:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1.0)
        except ValueError:
            name = ""
        if name not in legal:
            raise ValueError(f"reward {item!r}; legal: {', '.join(legal)}, each with =WEIGHT or without")
    return weights


def longest_prompt(wanted: int, answer: int, context: int) -> int:
    """Tokens that a prompt may have: `wanted`, or what an answer leaves of the context where that is 0."""
    longest = wanted or context - answer
    if not 0 < longest <= context - answer:
        raise ValueError(
            f"max_prompt_tokens = {wanted} and sampling.max_tokens = {answer} do not fit the model's context; "
            f"legal: a sum of at most {context}, with room for a prompt"
        )
    return longest


def read_prompts(
    path: str, template: str, tokenizer: Tokenizer, longest: int, held_out: int, seed: int
) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts of a jsonl file; those of more than `longest` tokens are dropped and counted."""
    text = from_template(new_lines(template))
    make = partial(Prompts, encode=tokenizer.encode, text=text, max_tokens=longest, pad=tokenizer.pad, seed=seed)
    train, exam = map(make, train_eval_split(read_jsonl(path), held_out, seed))
    log_info(
        f"{len(train)} prompts and {len(exam)} held out; {train.dropped + exam.dropped} dropped, over {longest} tokens"
    )
    return train, exam


def pretrained(
    directory: str, weights: Weights, mesh: jax.sharding.Mesh, context: int | None = None, seed: int = 0
) -> tuple[DecoderConfig, Params, dict]:
    """The model of a Hugging Face directory: its config, what is trained of it, and the frozen parts.

    Trained weights are float32. A base that an adapter leaves alone is held in the dtype of the computation. Raises
    ValueError for an adapter and frozen parts at once.
    """
    if weights.adapter.rank and weights.freeze:
        raise ValueError(
            "with an adapter the whole base is frozen: leave out --weights.freeze or --weights.adapter.rank"
        )
    config = hf.read_config(directory, context)
    adapter = LoraConfig(**dataclasses.asdict(weights.adapter)) if weights.adapter.rank else None
    config = dataclasses.replace(config, dtype=weights.dtype, remat=weights.remat, adapter=adapter)
    places = param_shardings(mesh, decoder.param_axes(config), decoder.abstract(config))
    dtype = weights.dtype if adapter else "float32"
    params = {"decoder": hf.load(directory, config, places, jnp.dtype(dtype))}
    if adapter is None:
        params, base = param_filters.split_frozen(params, *weights.freeze) if weights.freeze else (params, None)
        frozen = {"reference": jax.tree.map(jnp.copy, params)} | ({} if base is None else {"base": base})
        return config, params, frozen
    trained, frozen = policy.with_adapter(params, config, jax.random.fold_in(jax.random.key(seed), 3))
    if weights.reference_every:
        frozen["reference"] = jax.tree.map(jnp.copy, trained)
    return config, trained, frozen


def shardings_of(
    mesh: jax.sharding.Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    config: DecoderConfig,
    offload=(),
) -> Shardings:
    """Shardings of a state whose parameters, trained and frozen, are those of a decoder."""
    axes_of = partial(policy.logical_axes, config)
    frozen = {name: axes_of(part) for name, part in state.frozen.items()}
    return state_shardings(mesh, state, optimizer, axes_of(state.params), frozen, offload)


def fingerprint(*parts) -> str:
    """What an algorithm or verifier computes, as a hash of its code and of the numbers it closes over.

    Runs with a function of your own are told apart by it: an edited loss is another experiment.
    """

    def words(x, depth=0):
        inner = getattr(x, "__wrapped__", x.func if isinstance(x, partial) else None)
        if x is None or isinstance(x, int | float | str):
            return repr(x)
        if depth > 8:
            return type(x).__qualname__
        if isinstance(x, dict):
            return [[name, words(value, depth + 1)] for name, value in x.items()]
        if isinstance(x, list | tuple):
            return [words(y, depth + 1) for y in x]
        if inner is not None:
            return [words(y, depth + 1) for y in (inner, getattr(x, "args", ()), getattr(x, "keywords", {}))]
        if not hasattr(x, "__code__"):
            return type(x).__qualname__
        cells = [words(cell.cell_contents, depth + 1) for cell in x.__closure__ or ()]
        defaults = [words(y, depth + 1) for y in (x.__defaults__, x.__kwdefaults__) if y is not None]
        return [*code(x.__code__), cells, defaults]

    def code(x):
        return [x.co_code.hex(), x.co_names, [constant(c) for c in x.co_consts]]

    def constant(c):
        if isinstance(c, tuple | frozenset):
            parts = [constant(part) for part in c]
            return parts if isinstance(c, tuple) else sorted(parts, key=repr)  # the order of a set is not its own
        return code(c) if hasattr(c, "co_code") else repr(c)  # of lambdas and comprehensions inside

    return hashlib.sha256(repr(words(parts)).encode()).hexdigest()[:16]


def setup(debug: bool = False) -> None:
    """Process-wide: debugging, and a compilation cache outside the checkout (RLJAX_CACHE moves it; empty: none)."""
    cache = os.environ.get("RLJAX_CACHE", str(Path.home() / ".cache" / "rljax" / "xla"))
    if cache and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    jax.config.update("jax_default_matmul_precision", "float32")  # else TF32 on GPUs, bf16 on TPUs: no longer on-policy
    if debug:
        jax.config.update("jax_disable_jit", True)
        jax.config.update("jax_debug_nans", True)


def run(config_type: type, main: Callable) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    Unknown names, wrong types, and what the rooms refuse: one error that says what would be legal, exit code 2 or 1.
    The traceback is shown with --debug.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            config = tyro.cli(config_type)
    except SystemExit as stop:
        print(said.getvalue(), end="", file=sys.stderr)
        if stop.code and "Unrecognized" in said.getvalue():
            print(
                textwrap.fill("legal: " + " ".join(_flags(config_type)), 100, break_on_hyphens=False), file=sys.stderr
            )
        raise
    setup(getattr(config, "debug", False))
    try:
        main(config)
    except jax.errors.JaxRuntimeError:
        raise
    except (ValueError, ImportError, OSError, RuntimeError, RewardError, FloatingPointError) as error:
        if getattr(config, "debug", False):
            traceback.print_exc()
        log_info(f"error: {error}")
        raise SystemExit(1) from None


def _flags(config_type: type, prefix: str = "--") -> list[str]:
    out = []
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            out += _flags(field.type, f"{prefix}{field.name}.")
        else:
            out.append(prefix + field.name)
    return out
