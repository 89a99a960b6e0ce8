"""Fused against eager, eager against the formulas in numpy, and both against their invariants.

Known to be right by: the eager version differentiated by autograd (and checked by finite
differences), and a numpy transcription of the paper's three terms. A draft vocabulary is held
against the whole one with logits of minus infinity outside.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.config.schema import ObjectiveConfig
from deepspec.errors import MissingDependencyError
from deepspec.objective import LossInputs, LossOutput, compute_loss, kernels
from deepspec.targets import FrozenHead

TRAINED = ("hidden", "latent", "bias_weight", "confidence_logits")


def problem(
    slots: int = 23,
    vocabulary: int = 41,
    rank: int = 3,
    confidence: bool = True,
    dtype: torch.dtype = torch.float64,
    soft_cap: float | None = None,
    seed: int = 0,
    drafted: int | None = None,
) -> tuple[LossInputs, FrozenHead, FrozenHead]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weights = torch.rand(slots, generator=g) * (torch.rand(slots, generator=g) > 0.4)
    chosen = None
    if drafted is not None:
        chosen = torch.randperm(vocabulary, generator=g)[:drafted].sort().values
    rows = vocabulary if drafted is None else drafted
    positions = 1 + slots // 3  # behind three slots each, on average
    inputs = LossInputs(
        hidden=draw(slots, 8),
        latent=draw(slots, rank) if rank else None,
        bias_weight=draw(rows, rank) if rank else None,
        confidence_logits=draw(slots) if confidence else None,
        target_final=draw(positions, 6),
        target_rows=torch.randint(0, positions, (slots,), generator=g),
        labels=torch.randint(0, vocabulary, (slots,), generator=g),
        weights=weights,
        vocabulary=chosen,
    )
    heads = FrozenHead(draw(rows, 8), soft_cap), FrozenHead(draw(vocabulary, 6), soft_cap)
    return inputs, *heads


def run(
    inputs: LossInputs, heads: tuple[FrozenHead, FrozenHead], **options: object
) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    leaves = {
        name: value.clone().requires_grad_()
        for name in TRAINED
        if (value := getattr(inputs, name)) is not None
    }
    output = compute_loss(
        replace(inputs, **leaves), *heads, ObjectiveConfig(**options), denominator=3.7
    )
    output.loss.backward()
    return output, {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(
    inputs: LossInputs, heads, tolerance: float, chunk: int = 5, compile: str = "auto"
) -> None:
    eager, eager_grads = run(inputs, heads, implementation="eager")
    fused, fused_grads = run(inputs, heads, chunk_size=chunk, compile=compile)
    for name in ("loss", "ce_sum", "l1_sum", "confidence_sum", "acceptance"):
        torch.testing.assert_close(
            getattr(fused, name), getattr(eager, name), rtol=tolerance, atol=tolerance
        )
    assert eager_grads.keys() == fused_grads.keys()
    for name, grad in eager_grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 60),
    st.sampled_from([0, 1, 5]),
    st.booleans(),
    st.sampled_from([None, 4.0]),
    st.integers(1, 50),
    st.integers(0, 1000),
    st.none() | st.floats(0, 1),
)
def test_fused_equals_eager_in_fp64(
    slots, vocabulary, rank, confidence, cap, chunk, seed, share
) -> None:
    drafted = None if share is None else max(1, round(share * vocabulary))
    inputs, *heads = problem(
        slots, vocabulary, rank, confidence, soft_cap=cap, seed=seed, drafted=drafted
    )
    assert_same(inputs, tuple(heads), 1e-10, chunk)


@pytest.mark.parametrize("drafted", [None, 90])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_fused_equals_eager_in_training_precisions(
    dtype: torch.dtype, tolerance: float, drafted: int | None
) -> None:
    inputs, *heads = problem(200, 300, dtype=dtype, drafted=drafted)
    assert_same(inputs, tuple(heads), tolerance, chunk=64)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_a_draft_vocabulary_is_the_whole_one_without_chances_outside(implementation: str) -> None:
    """The same drafter over all tokens, whose logits outside are as good as minus infinity.

    To say it in weights: one more hidden number, 1, times a head that is -1e9 there.
    """
    inputs, draft_head, target_head = problem(drafted=17)
    ids = inputs.vocabulary
    head = torch.zeros(41, 9, dtype=torch.float64)
    head[:, 8] = -1e9
    head[ids] = torch.cat((draft_head.weight, torch.zeros(17, 1)), dim=1)
    w2 = torch.zeros(41, 3, dtype=torch.float64).index_copy(0, ids, inputs.bias_weight)
    hidden = torch.cat((inputs.hidden, torch.ones(23, 1)), dim=1)
    whole = replace(inputs, hidden=hidden, bias_weight=w2, vocabulary=None)

    options = {"implementation": implementation, "ce_weight": 0.0}
    reduced, grads = run(inputs, (draft_head, target_head), **options)
    expected, wanted = run(whole, (FrozenHead(head), target_head), **options)
    torch.testing.assert_close(reduced.loss, expected.loss)
    torch.testing.assert_close(reduced.acceptance, expected.acceptance)
    torch.testing.assert_close(grads["hidden"], wanted["hidden"][:, :8])
    torch.testing.assert_close(grads["latent"], wanted["latent"])
    torch.testing.assert_close(grads["bias_weight"], wanted["bias_weight"][ids])

    # cross-entropy: of labels inside as ever, of those outside nothing
    inside = torch.isin(inputs.labels, ids)
    assert 0 < (inputs.weights[inside] > 0).sum() < (inputs.weights > 0).sum()
    options = {"implementation": implementation, "l1_weight": 0.0, "confidence_weight": 0.0}
    reduced, _ = run(inputs, (draft_head, target_head), **options)
    counted = replace(whole, weights=inputs.weights * inside)
    expected, _ = run(counted, (FrozenHead(head), target_head), **options)
    torch.testing.assert_close(reduced.loss, expected.loss)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("drafted", [None, 17])
def test_latents_of_the_same_token_give_the_same_gradient(chunk: int, drafted: int | None) -> None:
    """Of slots that share a latent, whose gradient may come to any of them: summed by token."""
    inputs, *heads = problem(60, drafted=drafted)
    ids = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(1))
    inputs = replace(inputs, latent=inputs.latent[ids], latent_ids=ids)
    eager, wanted = run(inputs, tuple(heads), implementation="eager")
    fused, found = run(inputs, tuple(heads), chunk_size=chunk)
    torch.testing.assert_close(fused.loss, eager.loss)
    torch.testing.assert_close(fused.acceptance, eager.acceptance)
    for grads in (found, wanted):
        grads["latent"] = torch.zeros(9, 3).double().index_add(0, ids, grads["latent"])
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize("drafted", [None, 90])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_what_is_compiled_gives_the_same(
    dtype: torch.dtype, tolerance: float, drafted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expression itself, run as it is written."""
    monkeypatch.setattr(kernels, "_compiled", lambda: kernels.terms)
    inputs, *heads = problem(200, 300, dtype=dtype, drafted=drafted, soft_cap=9.0)
    assert_same(inputs, tuple(heads), tolerance, chunk=64, compile="always")


def test_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    chosen = {
        (device.type, wanted): kernels.compiled_terms(wanted, device) is not None
        for device in (cpu, cuda)
        for wanted in ("auto", "always", "never")
    }
    assert {key for key, value in chosen.items() if value} == {
        ("cpu", "always"),
        ("cuda", "auto"),
        ("cuda", "always"),
    }
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.compiled_terms("auto", cuda) is None
    with pytest.raises(MissingDependencyError, match=r"objective\.compile=always needs Triton"):
        kernels.compiled_terms("always", cuda)


@pytest.mark.slow  # half a minute of compiling
def test_compiled_once_for_batches_of_any_size() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for slots in (200, 64, 30, 301):
        inputs, *heads = problem(slots, 300, dtype=torch.float32)
        assert_same(inputs, tuple(heads), 1e-5, chunk=64, compile="always")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_eager_is_the_papers_formula() -> None:
    inputs, draft_head, target_head = problem()
    output, _ = run(inputs, (draft_head, target_head), implementation="eager")

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z)
        return e / e.sum(-1, keepdims=True)

    z = inputs.hidden @ draft_head.weight.T + inputs.latent @ inputs.bias_weight.T
    p, q = (
        softmax(z.numpy()),
        softmax((inputs.target_final[inputs.target_rows] @ target_head.weight.T).numpy()),
    )
    w = inputs.weights.numpy().astype(float)
    ce = -np.log(p[np.arange(len(w)), inputs.labels])
    l1 = np.abs(p - q).sum(-1)
    c, star = 1 / (1 + np.exp(-inputs.confidence_logits.numpy())), 1 - 0.5 * l1
    bce = -(star * np.log(c) + (1 - star) * np.log(1 - c))
    expected = (0.1 * w @ ce + 0.9 * w @ l1 + 1.0 * w @ bce) / 3.7
    np.testing.assert_allclose(output.loss.item(), expected, rtol=1e-10)
    np.testing.assert_allclose(output.acceptance, np.where(w > 0, star, 0), rtol=1e-10)
    # acceptance is also the overlap of the two distributions: what rejection sampling accepts
    np.testing.assert_allclose(star, np.minimum(p, q).sum(-1), rtol=1e-10)


def test_eager_gradient_by_finite_differences() -> None:
    inputs, *heads = problem(4, 7, 2)

    def loss(hidden: torch.Tensor, latent: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        # the confidence label is detached on purpose, so that term is left out here
        changed = replace(inputs, hidden=hidden, latent=latent, bias_weight=w2)
        config = ObjectiveConfig(implementation="fused", chunk_size=3, confidence_weight=0.0)
        return compute_loss(changed, *heads, config, 1.0).loss

    leaves = [getattr(inputs, name).clone().requires_grad_() for name in TRAINED[:3]]
    assert torch.autograd.gradcheck(loss, leaves)


def test_pieces_with_the_same_denominator_add_up() -> None:
    """Decision 2: how a step was cut into micro-batches does not matter."""
    inputs, *heads = problem()
    whole, whole_grads = run(inputs, tuple(heads))
    pieces = [slice(0, 9), slice(9, 10), slice(10, 23)]
    total, summed = 0.0, torch.zeros_like(whole_grads["bias_weight"])
    for piece in pieces:
        cut = {
            name: value[piece]
            for name in (*TRAINED, "target_rows", "labels", "weights")
            if name != "bias_weight" and (value := getattr(inputs, name)) is not None
        }
        output, grads = run(replace(inputs, **cut), tuple(heads))
        total += output.loss
        summed += grads["bias_weight"]
        torch.testing.assert_close(grads["hidden"], whole_grads["hidden"][piece])
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(summed, whole_grads["bias_weight"])


def test_slots_of_weight_zero_do_not_matter_even_when_rubbish() -> None:
    inputs, *heads = problem()
    before, grads = run(inputs, tuple(heads))
    rubbish = inputs.hidden.clone()
    rubbish[inputs.weights == 0] = float("nan")
    after, _ = run(replace(inputs, hidden=rubbish), tuple(heads))
    assert torch.equal(before.loss, after.loss)
    assert not grads["hidden"][inputs.weights == 0].any()


def test_no_slot_at_all() -> None:
    inputs, *heads = problem()
    output, grads = run(replace(inputs, weights=torch.zeros_like(inputs.weights)), tuple(heads))
    assert output.loss == 0
    assert not any(grad.any() for grad in grads.values())
