"""What TRL 1.16's trainers can be told, and which of it a replay obeys. Every argument is in one of four tables; one
that is in none, and a value that is not known, is an error that names it.

Defaults are those of transformers 5.23's TrainingArguments and of TRL's configs, for arguments that a manifest omits;
but the recorder's learning rate is constant and its numbers are float32 (README of the recordings).
"""

from fnmatch import fnmatchcase
from types import SimpleNamespace

# Obeyed by every trainer.
TRAINER = {
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8,
}
# Obeyed by one of them.
METHOD = {
    "sft": {"learning_rate": 2e-5, "loss_type": "nll"},
    "dpo": {
        "learning_rate": 1e-6,
        "loss_type": ("sigmoid",),
        "loss_weights": None,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
        "sync_ref_model": False,
    },
    "grpo": {
        "learning_rate": 1e-6,
        "loss_type": "dapo",
        "beta": 0.0,
        "use_bias_correction_kl": True,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "importance_sampling_level": "token",
        "temperature": 1.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "max_completion_length": 512,
        "steps_per_generation": None,
        "generation_batch_size": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "entropy_coef_min": 0.0,
        "entropy_coef_max": 1.0,
        "entropy_coef_delta": 0.005,
        "entropy_target": 0.2,
    },
}
# Would change the numbers, and rljax has nothing to replay it with: these values only.
ONLY = {
    "bf16": (False, None),
    "fp16": (False,),
    "optim_args": (None, ""),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "router_aux_loss_coef": (None, 0.0),
    "disable_dropout": (True, False),  # the models have none
    "cast_lm_head_to_fp32": (True, False),  # they are float32
}
# Change what stands in the batches, which are given, or nothing at all. Patterns.
ELSEWHERE = {
    "every trainer": (
        *("output_dir", "overwrite_output_dir", "run_name", "report_to", "project", "disable_tqdm", "push_to_hub"),
        *("num_train_epochs", "max_steps", "warmup_*", "lr_scheduler_kwargs", "seed", "data_seed", "full_determinism"),
        *("logging_*", "log_*", "save_*", "eval_*", "do_*", "hub_*", "dataloader_*", "ddp_*", "torch_compile*"),
        *("per_device_eval_batch_size", "gradient_checkpointing*", "activation_*", "use_cpu", "use_cache", "tf32"),
        *("remove_unused_columns", "average_tokens_across_devices", "include_*", "use_liger_kernel", "skip_memory_*"),
        *("model_init_kwargs", "trust_remote_code", "pad_to_multiple_of", "shuffle_dataset", "train_sampling_strategy"),
        *("dataset_num_proc", "max_length", "truncation_mode", "pad_token", "eos_token", "padding_free"),
    ),
    "sft": (
        *("completion_only_loss", "assistant_only_loss", "packing", "packing_strategy"),
        *("dataset_text_field", "dataset_kwargs", "chat_template_path"),
    ),
    "dpo": ("precompute_ref_*", "ref_model_*"),
    "grpo": (
        *("num_generations*", "num_iterations", "scale_rewards", "reward_weights", "multi_objective_aggregation"),
        *("mask_truncated_completions", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
        *("chat_template_kwargs", "cache_implementation", "max_tool_calling_iterations", "max_prompt_length"),
        *("use_transformers_*", "transformers_continuous_*", "use_vllm", "vllm_*", "ds3_*", "num_completions_*"),
        *("sync_ref_model", "ref_model_*"),
    ),
}
# What a micro-batch may hold: the keys that tell the trainer, and further ones.
KEYS = {
    "sft": (
        {"input_ids", "labels"},
        {"attention_mask", "position_ids", "num_items_in_batch", "seq_idx", "use_cache"}
        | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"},
    ),
    "dpo": (
        {"input_ids", "attention_mask", "completion_mask"},
        {"ref_chosen_logps", "ref_rejected_logps", "use_cache"},
    ),
    "grpo": (
        {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"},
        {"num_items_in_batch", "old_per_token_logps", "ref_per_token_logps", "tool_mask"}
        | {"importance_sampling_ratio", "sampling_per_token_logps"},
    ),
}


class Unsupported(ValueError):
    """The recording asks for what a replay cannot do; the message names it."""


def trainer_of(keys: set[str]) -> str:
    """sft, dpo or grpo, by the keys of a micro-batch."""
    for trainer, (required, further) in KEYS.items():
        if required <= keys:
            if unknown := keys - required - further:
                raise Unsupported(f"a batch of {trainer} holds {sorted(unknown)}; known: {sorted(required | further)}")
            return trainer
    raise Unsupported(
        f"no trainer has batches of {sorted(keys)}; known: " + str({k: sorted(v[0]) for k, v in KEYS.items()})
    )


def arguments_of(trainer: str, given: dict) -> SimpleNamespace:
    """The arguments that are obeyed, defaults filled in. Raises Unsupported for any other one."""
    obeyed = TRAINER | METHOD[trainer]
    elsewhere = ELSEWHERE["every trainer"] + ELSEWHERE[trainer]
    for name, value in given.items():
        if name in obeyed or any(fnmatchcase(name, pattern) for pattern in elsewhere):
            continue
        if name not in ONLY:
            raise Unsupported(f"{trainer} has the argument {name} = {value!r}, which tests/replay/arguments.py lacks")
        if value not in ONLY[name]:
            raise Unsupported(f"{trainer} has {name} = {value!r}; a replay knows {ONLY[name]} only")
    args = SimpleNamespace(**obeyed | {name: given[name] for name in obeyed if name in given})
    return known(args, trainer)


def choose(table: dict, name: str, value):
    """table[value], or an error that names the argument and what there is."""
    if value not in table:
        raise Unsupported(f"{name} = {value!r}; a replay knows {sorted(table)}")
    return table[value]


def known(args: SimpleNamespace, trainer: str) -> SimpleNamespace:
    """The arguments in one form. Raises Unsupported where two of them do not go together."""
    if trainer == "dpo":
        names = (args.loss_type,) if isinstance(args.loss_type, str) else tuple(args.loss_type)
        args.loss_type, args.loss_weights = names, args.loss_weights or [1.0] * len(names)
        matched = {"aot", "aot_unpaired"} & set(names)
        if args.use_weighting and "sft" in names:
            raise Unsupported("use_weighting = True with loss_type sft: TRL fails on it")
        if matched and (args.use_weighting or args.ld_alpha is not None):
            raise Unsupported(
                f"loss_type {sorted(matched)} with use_weighting or ld_alpha: rljax's aot weighs no token"
            )
    if trainer == "grpo":
        args.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        choose({"token": 1, "sequence": 1}, "importance_sampling_level", args.importance_sampling_level)
        if args.steps_per_generation is None:
            generated, rows = args.generation_batch_size, args.per_device_train_batch_size
            args.steps_per_generation = generated // rows if generated else args.gradient_accumulation_steps
        if args.use_adaptive_entropy and args.top_entropy_quantile < 1:
            raise Unsupported("use_adaptive_entropy with top_entropy_quantile < 1: the controller follows other tokens")
    return args
