#!/usr/bin/env bash
# Run a command again, from its checkpoint, after exit codes that are worth it:  retry.sh COMMAND [ARGUMENT...]
# For launchers that start a command on every host by itself and know no retries.

set -uo pipefail

RETRIES=${RETRIES:-20}
RETRY_ON=${RETRY_ON:-75 134 137 143}  # watchdog, a process that died, killed, told to end; never errors (1, 2)
WAIT=${WAIT:-120}                     # seconds in which JAX ends the other hosts: more than --hosts.heartbeat_seconds

for ((try = 0; ; try++)); do
  "$@"
  code=$?
  case " $RETRY_ON " in
    *" $code "*) ;;
    *) exit "$code" ;;
  esac
  ((try < RETRIES)) || exit "$code"
  echo "exit code $code: retry $((try + 1)) of $RETRIES in $WAIT seconds" >&2
  sleep "$WAIT"
done
