"""What one reads to get from a recipe to its loss. `python -m tests.reading_path` prints functions, lines and files.

The path is written down by name, as a person would walk it; each function on it must be named in the body of an
earlier one, which the syntax trees tell, so the list cannot claim a step that the code does not take. Left out is what
happens elsewhere: reading files, sampling, the forward pass of the decoder, logging.
"""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# The recipe's loop hands a batch to `update`; the update sums an objective; the objective is the algorithm's loss.
GRPO = (
    "experiments.grpo.main",
    "experiments.grpo.make_step",
    # the update
    "rljax.train.update.learn",
    "rljax.train.update.minibatches",
    "rljax.train.update.make_update",
    "rljax.train.update.jit_update",
    "rljax.train.update.accumulate_gradients",
    "rljax.train.update._cut",
    "rljax.train.update._join",
    "rljax.train.update._reduce_micro_batches",
    # the objective: the policy's log-probs, and the weighted sum of the loss's terms
    "rljax.train.objective.policy_objective",
    "rljax.train.objective._zero_masked_batch",
    "rljax.types.zero_masked",
    "rljax.train.objective._zero_masked_output",
    "rljax.train.objective._check_loss",
    "rljax.train.objective._reduce",
    "rljax.models.policy.make_policy",
    # the algorithm: advantages and weights, ratio and clipping, the KL term
    "experiments.grpo.named_algorithm",
    "experiments.common.algorithms.critic_free",
    "rljax.algorithms.grpo.grpo",
    "rljax.algorithms.common.credit.group_relative",
    "rljax.algorithms.common.credit.from_rewards",
    "rljax.algorithms.common.credit.outcome_rewards",
    "rljax.algorithms.common.credit.outcome_batch",
    "rljax.ops.weights.seq_mean_token_mean",
    "rljax.algorithms.common.credit.old_policy_logp",
    "rljax.ops.ratios.importance_ratio",
    "rljax.ops.losses.clipped_surrogate",
    "rljax.algorithms.common.wrappers.with_kl",
    "rljax.algorithms.common.wrappers._with_term",
    "rljax.algorithms.common.wrappers.with_needs",
    "rljax.ops.kl.k3",
)


class Function(NamedTuple):
    """A function at the top level of a module."""

    name: str  # dotted, from the checkout's root
    file: Path
    lines: int  # docstring and inner functions included
    mentions: frozenset[str]  # functions of this checkout that its body or signature names, dotted


def walk(path: tuple[str, ...] = GRPO) -> list[Function]:
    """The functions of a path. Raises ValueError for one that is not there, or that no earlier one names."""
    found = []
    reached = {path[0]}
    for name in path:
        if name not in reached:
            raise ValueError(f"{name} is named by none of the functions before it")
        function = read(name)
        found.append(function)
        reached |= function.mentions
    return found


def read(name: str) -> Function:
    """The function of this dotted name. Raises ValueError where there is none."""
    module, _, short = name.rpartition(".")
    node = functions_of(module).get(short)
    if node is None:
        raise ValueError(f"{name} is no function of this checkout")
    return Function(name, file_of(module), node.end_lineno - node.lineno + 1, frozenset(mentions(node, module)))


def mentions(node: ast.FunctionDef, module: str) -> set[str]:
    """Dotted names of the functions that a function names: called, or handed to another function."""
    dotted = (dotted_name(inner) for inner in ast.walk(node) if isinstance(inner, ast.Name | ast.Attribute))
    resolved = (resolve(name, module) for name in dotted if name is not None)
    return {name for name in resolved if name is not None}


def dotted_name(node: ast.expr) -> str | None:
    """a.b.c of an expression that is only names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def resolve(name: str, module: str) -> str | None:
    """The function that `name` stands for inside `module`, by its imports; None where it is no function of ours."""
    first, _, rest = name.partition(".")
    if not rest and first in functions_of(module):
        return f"{module}.{first}"
    target = imports_of(module).get(first)
    if target is None:
        return None
    full = f"{target}.{rest}" if rest else target
    return defined(full)


def defined(full: str) -> str | None:
    """The function behind a dotted name, through the imports of the packages that offer it under another."""
    module, _, short = full.rpartition(".")
    if not module:
        return None
    if short in functions_of(module):
        return full
    target = imports_of(module).get(short)
    return None if target in (None, full) else defined(target)


@cache
def tree_of(module: str) -> ast.Module | None:
    file = file_of(module)
    return ast.parse(file.read_text()) if file.is_file() else None


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def functions_of(module: str) -> dict[str, ast.FunctionDef]:
    tree = tree_of(module)
    return {} if tree is None else {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@cache
def imports_of(module: str) -> dict[str, str]:
    """Local name -> dotted name of what a module imports."""
    tree = tree_of(module)
    names = {}
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
    return names


def main() -> None:
    functions = walk()
    for function in functions:
        print(f"{function.lines:4d}  {function.name}  ({function.file.relative_to(ROOT)})")
    files = {function.file for function in functions}
    print(f"{sum(function.lines for function in functions):4d}  lines, {len(functions)} functions, {len(files)} files")


if __name__ == "__main__":
    main()
