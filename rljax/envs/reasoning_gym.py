"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym) as environments: the `agents` extra."""

from collections.abc import Mapping
from typing import Any

from rljax.envs.text import TextEnv, TextStep


def make_reasoning_gym(task: str, size: int, seed: int = 0, **settings: Any) -> tuple[TextEnv, list[dict]]:
    """A task of reasoning-gym by its name, and `size` rows of it: question and answer.

    One turn; what stands in its last <answer></answer>, or the whole turn without one, is scored from 0 to 1 as the
    task does. settings: of the task. Raises ImportError without reasoning-gym, ValueError for a task it does not know.
    """
    try:
        import reasoning_gym
        from reasoning_gym.utils import extract_answer
    except ImportError:
        raise ImportError("reasoning-gym is not installed: pip install 'rljax[agents]'") from None
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except ValueError as error:
        raise ValueError(f"reasoning-gym: {error}") from None
    rows = [{"entry": i, "question": entry["question"], "answer": entry["answer"]} for i, entry in enumerate(dataset)]

    def reset(row: Mapping[str, Any], seed: int) -> tuple[int, str]:
        return row["entry"], row["question"]

    def step(entry: int, text: str) -> TextStep:
        answer = extract_answer(text) or text.strip()
        return TextStep(entry, reward=float(dataset.score_answer(answer, dataset[entry])), terminated=True)

    return TextEnv(f"reasoning_gym:{task}", reset, step), rows
