"""What commands that train, extract and serve import; see tests/forked.py."""

import pytest  # noqa: F401
import uvicorn  # noqa: F401
from transformers import Qwen3ForCausalLM  # noqa: F401

import deepspec.commands.feature_sources
import deepspec.features.server
import deepspec.training.trainer  # noqa: F401
from tests.jobs import HAVE_DEEPSPEED

if HAVE_DEEPSPEED:
    import deepspeed  # noqa: F401
