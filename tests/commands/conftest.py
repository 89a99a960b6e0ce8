"""Commands meet exports for targets of another family."""

from tests.export.conftest import llama  # noqa: F401
