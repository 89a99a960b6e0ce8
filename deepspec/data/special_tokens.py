"""Tokens of a tokenizer that no plain text has."""

from __future__ import annotations

from typing import Any


def media_tokens(tokenizer: Any) -> list[str]:
    """Tokens that stand for images or sound, which no text has; the text-only models of a
    multimodal family have them in the tokenizer and not in the embedding (Gemma 3 1B)."""
    named = getattr(tokenizer, "special_tokens_map", {})
    media = ("image_token", "audio_token", "video_token")
    return [str(named[key]) for key in media if key in named]


def special_tokens(tokenizer: Any) -> set[str]:
    """The special tokens as text: those that are flagged so, whether or not they have a name."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
