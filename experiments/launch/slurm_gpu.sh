#!/usr/bin/env bash
# A run on GPU nodes under SLURM:  sbatch experiments/launch/slurm_gpu.sh
# The same command again goes on where the run stopped. Submit it from the checkout, on a disk that all nodes share.

#SBATCH --job-name=rljax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8     # one process a GPU, as JAX expects it under SLURM
#SBATCH --gpus-per-node=8       # not --gpus-per-task: each process must see all GPUs of its node
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue               # after a preemption, or a node that failed
#SBATCH --signal=TERM@300       # five minutes before the time is up every process saves a checkpoint and ends with 143
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

# ---- what to run; the variables can also be set when it is submitted
PYTHON=${PYTHON:-.venv/bin/python}
SCRIPT=${SCRIPT:-experiments/gsm8k_grpo.py}
ARGS=${ARGS:---directory runs/gsm8k_grpo/slurm}   # flags of the script
RETRIES=${RETRIES:-20}
RETRY_ON=${RETRY_ON:-75 134 137 143}              # watchdog, a process that died, killed, told to end
export RLJAX_CACHE=${RLJAX_CACHE:-$PWD/runs/xla}  # compiled programs, shared by all nodes
export HF_HOME=${HF_HOME:-$PWD/runs/huggingface}  # models and data sets, likewise
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

read -ra args <<<"$ARGS"
codes=$PWD/runs/.exit-codes-$SLURM_JOB_ID
trap 'rm -rf "$codes"' EXIT

# Every process writes its exit code, also when it is told to end (trap): that of srun is the highest of all, where the
# 134 of processes that miss another would hide its error (1). --wait: they have ten minutes to end, too.
step() {
  rm -rf "$codes"
  mkdir -p "$codes"
  # shellcheck disable=SC2016  # expanded by the processes
  srun --kill-on-bad-exit=0 --wait=600 bash -c \
    'trap : TERM; "$@"; code=$?; echo "$code" >"$0/$SLURM_PROCID"; exit "$code"' "$codes" "$PYTHON" "$@"
}

checked=
for ((try = 0; try <= RETRIES; try++)); do
  { [[ $checked ]] || step experiments/doctor.py; } && checked=yes && step "$SCRIPT" "${args[@]}" && exit 0
  failed=$?
  found=$(cat "$codes"/*) || exit "$failed"  # srun itself failed
  for code in $found; do
    case " 0 $RETRY_ON " in
      *" $code "*) ;;
      *) echo "exit code $code: a retry would meet it again" && exit "$code" ;;
    esac
  done
  left=$((${SLURM_JOB_END_TIME:-$(($(date +%s) + 86400))} - $(date +%s)))
  if ((left < 600)); then
    echo "the time is up: the job is queued again" && scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
  echo "exit code $failed: retry $((try + 1)) of $RETRIES, from the last checkpoint"
done
exit "$failed"
