#!/usr/bin/env bash
# A run on the hosts of a Cloud TPU slice, started from your own machine:
#   experiments/launch/tpu_vm.sh create | setup | doctor | run | logs | stop | delete
# `run` again goes on where the run stopped. Hosts find each other through the TPU's metadata.

set -euo pipefail

# ---- the slice
NAME=${NAME:-rljax}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}                    # 4 hosts with 4 chips each
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:---spot}                          # empty: not preemptible
# ---- a directory that all hosts share, here an NFS export (Filestore); checkpoints are written by all of them
NFS=${NFS:-10.0.0.2:/rljax}
# ---- what to run
SCRIPT=${SCRIPT:-experiments/gsm8k_grpo.py}
ARGS=${ARGS:---directory /shared/runs/gsm8k_grpo}
ENVIRONMENT=${ENVIRONMENT:-RLJAX_CACHE=/shared/xla HF_HOME=/shared/huggingface}

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case ${1:-} in
  create)  # a queued request, which waits for capacity
    # shellcheck disable=SC2086  # an empty SPOT is no argument
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --runtime-version="$VERSION" $SPOT
    ;;
  setup)  # the committed code; every host gets the same
    git archive --format=tar.gz --output=/tmp/rljax.tar.gz HEAD
    gcloud compute tpus tpu-vm scp /tmp/rljax.tar.gz "$NAME:" --zone="$ZONE" --worker=all
    on_every_host "mkdir -p rljax && tar -xzf rljax.tar.gz -C rljax && cd rljax \
      && python3.11 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,data]' \
      && sudo mkdir -p /shared && sudo mount -o rw,nolock $NFS /shared && sudo chmod a+rwx /shared"
    ;;
  doctor)
    on_every_host "cd rljax && $ENVIRONMENT .venv/bin/python experiments/doctor.py --directory /shared/runs"
    ;;
  run)  # goes on when this machine disconnects
    on_every_host "cd rljax || exit 1
      if kill -0 -- -\$(cat run.pid 2>/dev/null) 2>/dev/null; then echo 'a run is going on: stop it first'; exit 1; fi
      $ENVIRONMENT setsid experiments/launch/retry.sh .venv/bin/python $SCRIPT $ARGS >>run.log 2>&1 </dev/null &
      echo \$! >run.pid"
    ;;
  logs)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command="tail -n 100 -f rljax/run.log"
    ;;
  stop)  # with a checkpoint; `run` goes on
    on_every_host "cd rljax || exit 1
      group=\$(cat run.pid 2>/dev/null) || exit 0
      kill -- -\$group
      while kill -0 -- -\$group 2>/dev/null; do sleep 1; done
      rm run.pid"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
    ;;
  *)
    echo "usage: $0 create | setup | doctor | run | logs | stop | delete" >&2
    exit 2
    ;;
esac
