#!/usr/bin/env bash
# A run on a GKE cluster made by xpk:  experiments/launch/gke_xpk.sh
# xpk writes a JobSet much like gke_jobset.yaml. Another WORKLOAD with the same --directory goes on where it stopped.

set -euo pipefail

CLUSTER=${CLUSTER:-my-cluster}
ZONE=${ZONE:-us-west4-a}
WORKLOAD=${WORKLOAD:-rljax-1}
TYPE=${TYPE:-v5litepod-16}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/rljax/rljax:latest}  # with this checkout at /rljax, installed
STORAGE=${STORAGE:-rljax-runs}                                   # `xpk storage attach`: mounted at /shared on all hosts
COMMAND=${COMMAND:-python experiments/gsm8k_grpo.py --directory /shared/runs/gsm8k_grpo --hosts.deadline_seconds 1800}
RETRIES=${RETRIES:-20}

# xpk restarts a workload on exit codes from 127 to 255 (134, 137, 143) by itself, and on 75 when told; never on 1 or 2.
xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$WORKLOAD" \
  --tpu-type="$TYPE" --num-slices=1 --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts="$RETRIES" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
  --env="RLJAX_CACHE=/shared/xla" --env="HF_HOME=/shared/huggingface" \
  --command="cd /rljax && exec $COMMAND"
