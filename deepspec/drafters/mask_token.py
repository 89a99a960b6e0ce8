"""The token that fills the slots of a block which are not known yet.

Its embedding needs no trained meaning, because the drafter learns what it stands for. It must be a
row of the embedding, and should not be a token of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspec.errors import ConfigError
from deepspec.records import Sample

# parts of the names of special tokens; tokens that no model uses come first
SPARE_NAMES = ("mask", "reserved", "unused", "pad")


def resolve_mask_token(configured: int | None, target: Any) -> int:
    """The id for `target`: `configured`, or the tokenizer's mask token, or a row of the embedding
    that no token has, or the best of `spare_tokens`.

    Raises ConfigError when the id is outside the vocabulary or none can be found.
    """
    if configured is None:
        configured = mask_token_of(target)
    if configured is None:
        configured = next(iter(spare_tokens(target)), None)
    if configured is None:
        raise ConfigError(
            "the tokenizer has no mask token, the embedding no unused row, and the chat template "
            "uses every special token; set drafter.mask_token_id to a token that never occurs in "
            "text"
        )
    if not 0 <= configured < target.vocab_size:
        raise ConfigError(
            f"drafter.mask_token_id={configured} is outside the target's vocabulary of "
            f"{target.vocab_size}; choose an id from 0 to {target.vocab_size - 1}"
        )
    return int(configured)


def mask_token_of(target: Any) -> int | None:
    """The tokenizer's mask token, or a row of the embedding that no text can give; None if it
    has neither."""
    tokenizer = target.tokenizer
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    vocabulary = tokenizer.get_vocab()
    if "<|mask|>" in vocabulary:
        return vocabulary["<|mask|>"]
    # in a GGUF file a row without a token has the name [PAD<id>]
    taken = {index for token, index in vocabulary.items() if token != f"[PAD{index}]"}
    free = sorted(set(range(target.vocab_size)) - taken)
    highest = max(taken, default=-1)
    # Qwen3: 151669, the first row after the vocabulary
    return next((index for index in free if index > highest), free[-1] if free else None)


def spare_tokens(target: Any) -> list[int]:
    """Special tokens that the chat template does not name and that end no answer, best first."""
    tokenizer = target.tokenizer
    used = {tokenizer.bos_token_id, tokenizer.unk_token_id, *target.stop_token_ids}
    template = tokenizer.chat_template or ""
    found = {
        index: str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
        and index < target.vocab_size
        and index not in used
        and str(token) not in template
    }

    def rank(index: int) -> tuple[int, int]:
        name = found[index].lower()
        known = (place for place, part in enumerate(SPARE_NAMES) if part in name)
        return next(known, len(SPARE_NAMES)), -index

    return sorted(found, key=rank)


def mask_token_for(target: Any, samples: Iterable[Sample]) -> int:
    """The mask token for a training on `samples` that configures none.

    A special token of the target that occurs in them is passed over. Raises ConfigError where
    none is left.
    """
    if (own := mask_token_of(target)) is not None:
        return own
    left = spare_tokens(target)
    for sample in samples:
        present = set(sample.input_ids.tolist())
        left = [index for index in left if index not in present]
        if not left:
            break
    if not left:
        raise ConfigError(
            "the tokenizer has no mask token, the embedding no unused row, and the chat template "
            "or the data use every special token; set drafter.mask_token_id to one that is rare"
        )
    return left[0]
