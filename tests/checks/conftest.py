"""Checks look at exports: the same targets and drafters."""

from tests.export.conftest import llama  # noqa: F401
