#!/usr/bin/env bash
# Trains on the machines of a hostfile, which DeepSpeed's launcher reaches by pdsh over ssh.
#
#   launch/deepspeed.sh qwen3 target.path=./my-finetune out=/shared/runs/mine
#
# Needs pdsh here, ssh without a password to every machine, and the checkout and its environment at
# the same path on all of them; out= is a folder that they share. Words as in torchrun.sh.
# DRY_RUN=1 prints the command.
set -euo pipefail

HOSTFILE=${HOSTFILE:-$(dirname "$0")/hostfile} # SITE: one line a machine, `ADDRESS slots=GPUS`

recipe=${1:?usage: launch/deepspeed.sh RECIPE key=value ...}
shift
# without the file, DeepSpeed would train on this machine alone
[ -r "$HOSTFILE" ] || { echo "HOSTFILE=$HOSTFILE cannot be read" >&2 && exit 2; }
# forced: with one machine in the file, it is still that one and not this
exec ${DRY_RUN:+echo} deepspeed --hostfile "$HOSTFILE" --force_multi \
    --master_port "${MASTER_PORT:-29500}" --module deepspec train "recipe=$recipe" engine=zero2 "$@"
