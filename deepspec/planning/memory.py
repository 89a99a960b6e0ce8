"""Memory a device: its parts, and the moment of a step at which most of them meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accelerate.utils import convert_file_size_to_int

from deepspec.config.schema import COLLECTIVE
from deepspec.drafters.dspark_v4 import DSparkV4Config
from deepspec.planning.activations import Activations, drafter_activations
from deepspec.planning.dspark_v4 import v4_activations
from deepspec.planning.forward import features_bytes, objective_bytes, target_bytes
from deepspec.planning.shapes import FP32, Job, MicroBatch
from deepspec.planning.states import engine_states

ELSEWHERE = ("stored", "remote")  # values of features.source that load no decoder layer
# CUDA's context, cuBLAS workspaces, NCCL: a guess, nothing here was measured on a GPU
CUDA_RUNTIME = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `parts`: by name, not all alive together; `moments`: the sum of what is
    alive at each of the step's moments; `host`: bytes beside the device (engine.offload=cpu)."""

    parts: dict[str, int]
    moments: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        """The most that is alive at a time."""
        return max(self.moments.values())

    @property
    def when(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])


def target_weights(job: Job) -> int:
    """Bytes of the target's weights on one device. Embedding and head are read by the drafter and
    the objective: they are there whole, beside a target that is split or elsewhere."""
    config, shapes = job.config, job.shapes
    whole, ends = shapes.target_parameters * job.value, shapes.ends * job.value
    scaled = shapes.scaled_ends * job.value
    if config.features.source in ELSEWHERE:
        return ends + scaled
    if config.target.parallel in COLLECTIVE:
        return -(-whole // job.world) + ends + scaled
    if config.target.parallel == "device_map" and config.target.max_memory is not None:
        return min(whole, convert_file_size_to_int(config.target.max_memory)) + ends + scaled
    return whole + scaled


def activations(job: Job, batch: MicroBatch) -> Activations:
    """What the drafter's forward keeps, by its kind."""
    shape = job.shapes.drafter
    streams = 1
    if isinstance(shape, DSparkV4Config):
        kept, streams = v4_activations(job, shape, batch), shape.hc_mult
    else:
        kept = drafter_activations(job, batch)
    if not job.config.training.activation_checkpointing:
        return kept
    # a layer's input stays, and the backward of a layer has the rest of it once more
    inputs = batch.slots * streams * shape.hidden_size * FP32
    layers = (inputs,) * len(kept.layers)
    return replace(kept, layers=layers, mlp=kept.mlp + max(kept.layers) - inputs)


def draft_head(job: Job) -> int:
    """Bytes of the LM head's rows for a draft vocabulary: a copy, beside the whole head."""
    shape, drafted = job.shapes.drafter, job.shapes.drafted
    return 0 if drafted == shape.vocab_size else drafted * shape.hidden_size * job.value


def memory_of(job: Job, batch: MicroBatch) -> Memory:
    """Memory a device while a micro-batch like `batch` is trained on."""
    states, kept = engine_states(job), activations(job, batch)
    loss, features = objective_bytes(job, batch), features_bytes(job, batch)
    weights, elsewhere = target_weights(job), job.config.features.source in ELSEWHERE
    target_forward = 0 if elsewhere else target_bytes(job, batch)
    runtime = CUDA_RUNTIME if job.cuda else 0

    always = weights + draft_head(job) + states.weights + states.optimizer
    always += states.staying + runtime
    if job.config.features.overlap:  # the target computes all the while, and what it did waits
        always += target_forward + job.config.features.prefetch * features
    forward = always + states.gathered + states.waiting + features
    # as it begins, everything that the forward kept is there
    first = kept.total + max(loss.backward, loss.left + kept.mlp) + states.waiting
    # at the first layer, the other layers' activations are gone, but all gradients are there; those
    # of an only layer come as its activations go
    left = kept.layers[0] if len(kept.layers) > 1 else 0
    last = kept.context + left + kept.casts + kept.mlp + max(states.gradients, states.waiting)
    moments = {
        "target": always + states.waiting + target_forward,
        "objective": forward + kept.total + loss.forward,
        "backward": forward - states.waiting + states.buffers + max(first, last),
        "update": always + states.gradients + states.update,
    }
    parts = {
        "target weights": weights,
        "its head's rows for the drafts": draft_head(job),
        "target's forward": target_forward,
        "features": features,
        "drafter weights": states.weights + states.gathered,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "optimizer's temporaries": states.update,
        "DeepSpeed's buckets": states.buffers + states.staying,
        "drafter's activations": kept.total,
        "objective": loss.forward,
        "CUDA runtime (a guess)": runtime,
    }
    return Memory({name: size for name, size in parts.items() if size}, moments, states.host)


def checkpoint_bytes(job: Job) -> int:
    """Weights and AdamW's two moments, fp32, whatever the engine."""
    return 3 * FP32 * job.shapes.trainable
