"""experiments/launch: the scripts parse, the YAML has the fields of its kind, and what is retried is retried."""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from distributed import launch
from experiments import gsm8k_grpo
from experiments.common import command_line
from experiments.common.settings import Hosts
from experiments.tools import tiny_model

HERE = Path(__file__).parent
LAUNCH = launch.ROOT / "experiments" / "launch"
RETRIED = {75, 134, 137, 143}
SCHEMAS = {"gke_jobset": "jobset", "skypilot": "skypilot"}


def read_yaml(name: str) -> dict:
    return YAML(typ="safe").load((LAUNCH / f"{name}.yaml").read_text())


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_parses(script):
    """`make lint` has shellcheck look at them too."""
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_yaml_has_the_fields_of_its_kind(name, schema):
    validator = jsonschema.Draft202012Validator(json.loads((HERE / f"{schema}.schema.json").read_text()))
    document = read_yaml(name)
    assert [error.message for error in validator.iter_errors(document)] == []
    assert not validator.is_valid(document | {"restarts": 3})


def test_the_jobset_is_one_process_a_host_of_the_slice():
    spec = read_yaml("gke_jobset")["spec"]
    (job,) = spec["replicatedJobs"]
    template = job["template"]["spec"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert (
        template["parallelism"]
        == template["completions"]
        == chips // container["resources"]["limits"]["google.com/tpu"]
    )
    assert (template["completionMode"], template["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    preempted, refused = template["podFailurePolicy"]["rules"]
    assert preempted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "NotIn",
        "values": sorted(RETRIED),
    }
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert spec["failurePolicy"]["maxRestarts"] > 0


def test_all_of_them_retry_the_same_codes():
    for name in ("slurm_gpu.sh", "retry.sh"):
        (codes,) = re.findall(r"RETRY_ON:-([\d ]+)}", (LAUNCH / name).read_text())
        assert set(map(int, codes.split())) == RETRIED
    xpk = (LAUNCH / "gke_xpk.sh").read_text()
    assert re.findall(r"--restart-on-exit-codes=([\d,]+)", xpk) == ["75"]  # 127 to 255 are xpk's own


def restarts_of_skypilot(failures: list[list[int]]) -> int:
    """How often SkyPilot starts a job again whose nodes end with these codes, one list for each start, as
    `StrategyExecutor.should_restart_on_failure` decides (SkyPilot, sky/jobs/recovery_strategy.py).
    """
    recovery = read_yaml("skypilot")["resources"]["job_recovery"]
    errors = 0
    for restarts, codes in enumerate(failures):
        if not set(codes) & set(recovery["recover_on_exit_codes"]):
            errors += 1
            if errors > recovery["max_restarts_on_errors"]:
                return restarts
    return len(failures)


def test_skypilot_gives_up_on_errors_though_it_kills_the_other_nodes():
    """It records 137 for nodes that it kills."""
    assert restarts_of_skypilot([[1, 137]] * 50) == 3
    assert restarts_of_skypilot([[2, 2]] * 50) == 3
    assert restarts_of_skypilot([[137, 137]]) == 1  # one that the machine killed
    for code in RETRIED - {137}:
        assert restarts_of_skypilot([[code, 137]] * 50) == 50


def test_hosts_of_gke_wait_for_each_other_longer_than_nodes_take_to_come_up():
    (job,) = read_yaml("gke_jobset")["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    xpk = (LAUNCH / "gke_xpk.sh").read_text()
    for words in (container["command"], shlex.split(re.search(r"COMMAND:-(.*)}", xpk)[1])):
        assert float(words[words.index("--hosts.deadline_seconds") + 1]) >= 1800


def commands_of(text: str) -> list[list[str]]:
    """The words of every line `python experiments/NAME.py ...`, from the script on."""
    found = re.findall(r"python3? (experiments/.*)", text.replace("\\\n", " "))
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("path", [*LAUNCH.iterdir(), launch.ROOT / "docs" / "scale.md"], ids=lambda path: path.name)
def test_what_is_run_is_there(path):
    """Every script that is named exists, and every flag is one of its flags."""
    text = path.read_text()
    for script in re.findall(r"experiments/[\w/]+\.\w+", text):
        assert (launch.ROOT / script).is_file(), script
    hosts = set(command_line.flags_of(Hosts, "--hosts."))
    recipe = set(command_line.flags_of(gsm8k_grpo.Config)) | hosts
    for given in re.findall(r"ARGS[:=-]+ ?(--.*?)[}\n]", text):
        assert {word for word in shlex.split(given, comments=True) if word.startswith("--")} <= recipe
    assert set(re.findall(r"--hosts\.\w+", text)) <= hosts
    for script, *words in commands_of(text) if path.suffix == ".md" else ():
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        legal = set(command_line.flags_of(module.Config)) | hosts
        assert {word for word in words if word.startswith("--")} <= legal, script


# ----------------------------------------------------------------------------------------------------- what is retried


def retry(tmp_path: Path, codes: list[int], **environ: str) -> tuple[int, int]:
    """retry.sh around a command that ends with these codes, one after the other: its own code, and how often it ran."""
    count = tmp_path / "count"
    count.write_text("")
    command = tmp_path / "command"
    command.write_text(
        f'#!/usr/bin/env bash\ncodes=({" ".join(map(str, codes))})\nn=$(wc -c <"{count}")\nprintf x >>"{count}"\n'
        "exit ${codes[n]}\n"
    )
    command.chmod(0o755)
    environ = os.environ | {"WAIT": "0"} | environ
    done = subprocess.run([LAUNCH / "retry.sh", command], env=environ, capture_output=True, text=True)
    return done.returncode, len(count.read_text())


def test_retry_goes_on_after_what_is_worth_it(tmp_path):
    assert retry(tmp_path, [75, 134, 137, 143, 0]) == (0, 5)
    assert retry(tmp_path, [1]) == (1, 1)
    assert retry(tmp_path, [75, 2]) == (2, 2)
    assert retry(tmp_path, [75, 75, 75, 0], RETRIES="2") == (75, 3)


# gcloud, whose hosts are folders of this machine.
GCLOUD = """#!/usr/bin/env bash
command=${!#}
for host in "$HOSTS"/*; do
  (cd "$host" && exec bash -c "${command#--command=}") &
  hosts+=($!)
done
for host in "${hosts[@]}"; do
  wait "$host" || code=1
done
exit "${code:-0}"
"""
# A run that saves a checkpoint when it is told to end.
STOPPABLE = """#!/usr/bin/env bash
trap 'sleep 0.2; touch saved; exit 143' TERM
echo "$*" >>started
sleep 60 &
wait
"""


def tpu_vm(hosts: Path, *words: str) -> subprocess.CompletedProcess:
    environ = os.environ | {"PATH": f"{hosts.parent}:{os.environ['PATH']}", "HOSTS": str(hosts), "WAIT": "0"}
    words = [LAUNCH / "tpu_vm.sh", *words]
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=30)


def test_a_run_on_a_tpu_slice_is_stopped_with_a_checkpoint(tmp_path):
    hosts = [tmp_path / "hosts" / name / "rljax" for name in "01"]
    for host in hosts:
        (host / ".venv" / "bin").mkdir(parents=True)
        (host / "experiments").mkdir()
        (host / "experiments" / "launch").symlink_to(LAUNCH)
        (host / ".venv" / "bin" / "python").write_text(STOPPABLE)
        (host / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    call = partial(tpu_vm, tmp_path / "hosts")

    assert call("stop").returncode == 0  # there is none
    for _ in range(2):
        assert call("run").returncode == 0
        deadline = time.monotonic() + 20
        while not all((host / "started").exists() for host in hosts) and time.monotonic() < deadline:
            time.sleep(0.05)
        twice = call("run")
        assert (twice.returncode, twice.stdout) == (1, "a run is going on: stop it first\n" * 2)
        groups = [int((host / "run.pid").read_text()) for host in hosts]
        done = call("stop")
        assert done.returncode == 0, done.stderr
        for host, group in zip(hosts, groups, strict=True):
            (host / "saved").unlink()  # by the time that stop is over
            assert (host / "started").read_text() == "experiments/gsm8k_grpo.py --directory /shared/runs/gsm8k_grpo\n"
            (host / "started").unlink()
            with pytest.raises(ProcessLookupError):
                os.killpg(group, 0)


def slurm(tmp_path: Path, python: str, tasks: int = 2, **environ: str) -> subprocess.CompletedProcess:
    """slurm_gpu.sh in an allocation of this machine, whose python is a script of this text."""
    place = tmp_path / "bin"
    place.mkdir(exist_ok=True)
    (place / "python").write_text("#!/usr/bin/env bash\n" + python)
    (place / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" >>"{tmp_path}/scontrol"\n')
    (place / "srun").write_text((HERE / "fake_srun").read_text())
    for name in ("python", "scontrol", "srun"):
        (place / name).chmod(0o755)
    own = {
        "PATH": f"{place}:{os.environ['PATH']}",
        "PYTHON": str(place / "python"),
        "SLURM_JOB_ID": "7",
        "FAKE_TASKS": str(tasks),
        "FAKE_WAIT": "5",
        "JAX_COORDINATOR_PORT": str(launch.free_port()),
    }
    environ = os.environ | own | environ
    return subprocess.run([LAUNCH / "slurm_gpu.sh"], env=environ, cwd=tmp_path, capture_output=True, text=True)


# It logs what it is asked to run, and ends with the code of its process and attempt in codes/PROCESS (default 0).
SCRIPTED = """
if [[ $1 == *doctor.py ]]; then
  echo >>"checked$SLURM_PROCID"
  read -ra codes <<<"${DOCTOR:-0}"
  exit "${codes[$(wc -l <"checked$SLURM_PROCID") - 1]}"
fi
n=$(grep -c . "ran$SLURM_PROCID" 2>/dev/null)
echo "$*" >>"ran$SLURM_PROCID"
read -ra codes <"codes$SLURM_PROCID"
exit "${codes[n]:-0}"
"""


def scripted(tmp_path: Path, codes: list[str], **environ: str) -> tuple[int, int]:
    """The code of slurm_gpu.sh where the processes end so, and how often it started them."""
    for process, own in enumerate(codes):
        (tmp_path / f"codes{process}").write_text(own)
        for name in ("ran", "checked"):
            (tmp_path / f"{name}{process}").unlink(missing_ok=True)
    done = slurm(tmp_path, SCRIPTED, len(codes), **environ)
    log = tmp_path / "ran0"
    assert not list(tmp_path.glob("runs/.exit-codes*"))
    return done.returncode, len(log.read_text().splitlines()) if log.exists() else 0


def test_slurm_goes_on_after_what_is_worth_it(tmp_path):
    assert scripted(tmp_path, ["0", "0"]) == (0, 1)
    assert scripted(tmp_path, ["75 0", "75 0"]) == (0, 2)
    assert scripted(tmp_path, ["134 137 0", "137 134 0"]) == (0, 3)
    assert scripted(tmp_path, ["143 0", "143 0"]) == (0, 2)
    assert scripted(tmp_path, ["75 75 75", "75 75 75"], RETRIES="1") == (75, 2)
    assert scripted(tmp_path, ["75 0", "75 0"], DOCTOR="75 0") == (0, 2)  # a host came late; it is checked once
    assert (tmp_path / "checked0").read_text() == "\n" * 2
    assert (tmp_path / "ran0").read_text().splitlines()[0] == (
        "experiments/gsm8k_grpo.py --directory runs/gsm8k_grpo/slurm"
    )


def test_slurm_stops_at_an_error_that_others_hide(tmp_path):
    """Process 0 is refused, and JAX ends the other one for missing it: srun's code is 134, the highest."""
    assert scripted(tmp_path, ["1", "134"]) == (1, 1)
    assert scripted(tmp_path, ["137", "2"]) == (2, 1)
    assert scripted(tmp_path, ["0", "0"], DOCTOR="1") == (1, 0)


def test_slurm_queues_the_job_again_when_its_time_is_up(tmp_path):
    assert scripted(tmp_path, ["143", "143"], SLURM_JOB_END_TIME="0") == (0, 1)
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_slurm_runs_the_doctor_on_two_processes(tmp_path):
    python = f'[[ $1 == *doctor.py ]] || exit 0\nexec {sys.executable} {launch.ROOT}/"$1" --directory runs\n'
    done = slurm(tmp_path, python, PYTHONPATH=str(launch.ROOT), JAX_NUM_CPU_DEVICES="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 checks on 2 processes" in done.stdout
    assert "4 cpu, 2 processes with 2 each" in done.stdout


# The first time, process 1 is killed once there is a checkpoint. Process 0 then loses it in a collective.
KILLED_ONCE = """
[[ $1 == *doctor.py ]] && exit 0
{python} {root}/"$@" &
pid=$!
if [[ $SLURM_PROCID == 1 && ! -e killed ]]; then
  until compgen -G "run/checkpoints/*.json" >/dev/null || ! kill -0 "$pid"; do sleep 0.1; done
  touch killed
  kill -KILL "$pid"
fi
wait "$pid"
"""


@pytest.mark.nightly
def test_slurm_trains_on_after_a_process_that_was_killed(shared, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join((shared / "data" / "gsm8k_train.jsonl").read_bytes().splitlines(True)[:32]))
    tiny_model.main(tiny_model.Config(str(tmp_path / "model"), texts=str(prompts), width=32, layers=1))
    flags = {
        "model": tmp_path / "model",
        "prompts": prompts,
        "directory": "run",
        "steps": 30,
        "batches.prompts": 4,
        "batches.num_generations": 2,
        "batches.minibatches": 1,
        "sampling.max_tokens": 8,
        "eval_prompts": 4,
        "eval_samples": 4,
        "eval_every": 0,
        "save_every": 1,
    }
    done = slurm(
        tmp_path,
        KILLED_ONCE.format(python=sys.executable, root=launch.ROOT),
        ARGS=" ".join(f"--{name} {value}" for name, value in flags.items()),
        PYTHONPATH=str(launch.ROOT),
        JAX_NUM_CPU_DEVICES="2",
        FAKE_WAIT="60",
        RETRIES="3",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retry 1 of 3, from the last checkpoint" in done.stdout
    assert "retry 2" not in done.stdout
    assert re.search(r"resumed after step [1-9]\d* of 30", done.stdout)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(30))
