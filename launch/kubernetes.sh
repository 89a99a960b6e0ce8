#!/usr/bin/env bash
# Prints kubernetes.yaml for a recipe, ready for kubectl.
#
#   IMAGE=registry/deepspec NODES=2 GPUS=8 launch/kubernetes.sh qwen3 target.path=/runs/my-finetune \
#       | kubectl apply -f -
#   kubectl logs -f job/deepspec-qwen3 --all-pods --prefix
#
# IMAGE has deepspec[deepspeed] installed. Words as in torchrun.sh. Files that words name lie on the
# shared volume, which is /runs in every pod; so does out=, /runs/RECIPE unless a word says otherwise.
set -euo pipefail

STORAGE_CLASS=${STORAGE_CLASS:-shared} # SITE: a storage class that many nodes can write to

recipe=${1:?usage: launch/kubernetes.sh RECIPE key=value ... | kubectl apply -f -}
shift
name=$(basename "$recipe" .yaml)
name=${name,,}
name=${name//[^a-z0-9]/-}
nodes=${NODES:-1}
words=""
for word in "recipe=$recipe" engine=zero2 engine.timeout=600 "out=/runs/$name" "$@"; do
    word=${word//\\/\\\\}
    words+=", \"${word//\"/\\\"}\""
done

text=$(<"$(dirname "$0")/kubernetes.yaml")
text=${text//@NAME@/"deepspec-$name"}
text=${text//@IMAGE@/"${IMAGE:?the container image that has deepspec}"}
text=${text//@NODES@/"$nodes"}
text=${text//@GPUS@/"${GPUS:-8}"}
text=${text//@RETRIES@/"$((10 * nodes))"}
text=${text//@STORAGE_CLASS@/"$STORAGE_CLASS"}
text=${text//@STORAGE@/"${STORAGE:-500Gi}"}
printf '%s\n' "${text//@WORDS@/"$words"}"
