#!/usr/bin/env bash
# Trains with a process on every device of this machine, or of this and other machines.
#
#   launch/torchrun.sh qwen3 target.path=./my-finetune data.path=[prompts.jsonl] out=runs/mine
#   PROCESSES=2 launch/torchrun.sh tiny engine.device=cpu
#
# The first word is the recipe; the others go to `deepspec train`, with engine=zero2 unless one of
# them names another. PROCESSES is their number on this machine. For several machines, start the same
# command on each, with NODES, its own NODE_RANK (from 0) and the first one's address in MASTER_ADDR;
# out= is then a folder that all of them share. DRY_RUN=1 prints the command.
set -euo pipefail

PYTHON=${PYTHON:-python} # SITE: the Python that has deepspec

recipe=${1:?usage: launch/torchrun.sh RECIPE key=value ...}
shift
where=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
    # Fixed ranks rather than the c10d rendezvous: there, a machine that is cut off from the first
    # one keeps its torchrun waiting for a quarter of an hour after its trainers gave up (torch 2.13).
    where=(--nnodes "$NODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
        --master-port "${MASTER_PORT:-29500}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# how long torchrun lets the trainers save after SIGTERM; by itself 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
exec ${DRY_RUN:+echo} "$PYTHON" -m torch.distributed.run "${where[@]}" \
    --nproc-per-node "${PROCESSES:-gpu}" -m deepspec train "recipe=$recipe" engine=zero2 "$@"
