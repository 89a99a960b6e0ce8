"""What commands that train, extract and serve import: for the process that tests/forked.py forks,
which ends with the tests, and all that it forked with it."""

import pytest  # noqa: F401
import uvicorn  # noqa: F401
from transformers import Qwen3ForCausalLM  # noqa: F401

import deepspec.commands.feature_sources
import deepspec.features.server
import deepspec.training.trainer  # noqa: F401
from deepspec.processes import die_with_parent
from tests.jobs import HAVE_DEEPSPEED

if HAVE_DEEPSPEED:
    import deepspeed  # noqa: F401

die_with_parent()
