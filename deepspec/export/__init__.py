"""Files for serving engines: one file a layout, and the model card that goes with it."""

from deepspec.export.card import model_card
from deepspec.export.deepseek_v4 import (
    deepseek_v4_config,
    deepseek_v4_shape,
    export_deepseek_v4,
    is_deepseek_v4,
    load_deepseek_v4,
)
from deepspec.export.engines import Support, loads_in
from deepspec.export.flat import (
    PROFILES,
    export_flat,
    flat_config,
    flat_shape,
    is_flat_export,
    load_flat,
)

__all__ = [
    "PROFILES",
    "Support",
    "deepseek_v4_config",
    "deepseek_v4_shape",
    "export_deepseek_v4",
    "export_flat",
    "flat_config",
    "flat_shape",
    "is_deepseek_v4",
    "is_flat_export",
    "load_deepseek_v4",
    "load_flat",
    "loads_in",
    "model_card",
]
