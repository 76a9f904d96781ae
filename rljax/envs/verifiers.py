"""Tasks of verifiers (https://github.com/PrimeIntellect-ai/verifiers) as environments: the `verifiers` extra.

verifiers 0.4 runs an agent program against a model's server. Here the model is sampled by rljax, so that its ids and
log-probs are those it is trained on, and what is taken of verifiers are the tasks: their prompts and their rewards. A
task that needs tool servers or a container of its own is refused.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from rljax.envs.text import TextEnv, TextStep


def make_verifiers(tasks: Iterable[Any], name: str = "verifiers") -> tuple[TextEnv, list[dict]]:
    """Tasks of a `verifiers.v1.Taskset` as an environment of one turn, and a row for each.

    The reward is the weighted sum of the task's own (`Trace.reward`). Raises ImportError without verifiers, ValueError
    for a task without a prompt, and for one that needs more than an answer to be scored.
    """
    try:
        import verifiers.v1 as vf
        from verifiers.v1.graph import MessageNode
        from verifiers.v1.trace import AgentInfo, Trace, TraceTask
    except ImportError:
        raise ImportError("verifiers is not installed: pip install 'rljax[verifiers]'") from None
    tasks = list(tasks)
    prompts = [_prompt(task, i) for i, task in enumerate(tasks)]

    def reset(row: Mapping[str, Any], seed: int) -> tuple[int, list[dict]]:
        return row["task"], prompts[row["task"]]

    def step(number: int, text: str) -> TextStep:
        task = tasks[number]
        kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
        dialogue = [*prompts[number], {"role": "assistant", "content": text}]
        nodes = [
            MessageNode(
                parent=i - 1 if i else None,
                message=kinds[message["role"]](content=message["content"]),
                sampled=i == len(dialogue) - 1,
            )
            for i, message in enumerate(dialogue)
        ]
        about = TraceTask(type=type(task).__name__, data=task.data)
        trace = Trace(task=about, agent=AgentInfo(config=vf.AgentConfig()), nodes=nodes)
        asyncio.run(task.score(trace))
        metrics = {key: float(value) for key, value in trace.metrics.items() if value is not None}
        return TextStep(number, reward=float(trace.reward), terminated=True, info=metrics)

    return TextEnv(name, reset, step), [{"task": i} for i in range(len(tasks))]


def _prompt(task: Any, number: int) -> list[dict]:
    """The messages that a task begins with."""
    needs = [
        *(["tool servers"] if type(task).toolsets(task.config) else []),
        *(["a container"] if type(task).NEEDS_CONTAINER or task.data.image else []),
    ]
    if needs:
        raise ValueError(f"task {number} of verifiers needs {' and '.join(needs)}; legal: prompts with rewards")
    if not task.data.prompt_text:
        raise ValueError(f"task {number} of verifiers has no prompt; legal: a prompt of text")
    system = [{"role": "system", "content": task.data.system_prompt}] if task.data.system_prompt else []
    if isinstance(task.data.prompt, str):
        return [*system, {"role": "user", "content": task.data.prompt}]
    return [*system, *({"role": message.role, "content": message.content} for message in task.data.prompt)]
