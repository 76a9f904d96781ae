"""docs/rewards.md: its server runs and speaks the protocol, and its flags and statuses are those of the code."""

import dataclasses
import http.server
import re
import threading
import types
import typing
from pathlib import Path

from experiments.common.settings import Reward
from rewards.test_remote import PATIENT, TRAJ, decode_all
from rewards.test_score import COLUMNS, rows_of
from rljax.rewards.remote import make_remote_reward
from rljax.rewards.worker import FAILED, Result

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_its_server_speaks_the_protocol():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    module = types.ModuleType("server")
    exec(code, module.__dict__)
    module.Rewards.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), module.Rewards) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            reward = make_remote_reward(f"http://127.0.0.1:{server.server_port}", decode_all, PATIENT)
            results = reward(TRAJ, rows_of(COLUMNS))
        finally:
            server.shutdown()
            thread.join()
    assert results == [Result(1.0, "ok"), Result(1.0, "ok"), Result(1.0, "ok"), Result(0.0, "ok")]


def test_its_flags_and_statuses_are_those_of_the_code():
    fields = {field.name for field in dataclasses.fields(Reward)}
    assert set(re.findall(r"--reward\.(\w+)", PAGE)) <= fields
    defaults = dict(re.findall(r"`--reward\.(\w+)`\s\((\d+)\)", PAGE))
    assert {name: getattr(Reward(), name) for name in defaults} == {name: float(x) for name, x in defaults.items()}
    assert len(defaults) == 4
    statuses = set(re.findall(r"^\| `(\w+)` \| (?:verifiers|servers)", PAGE, flags=re.MULTILINE))
    assert statuses == {*FAILED, "none"}
    assert {*FAILED, "ok", "none", "error"} == set(typing.get_args(Result.__annotations__["status"]))
