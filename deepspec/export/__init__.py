"""Files for serving engines: layouts, the engines that load them, and the model card."""

from deepspec.export.card import model_card
from deepspec.export.engines import Support, Traits, loads_in
from deepspec.export.layouts import (
    LAYOUTS,
    Export,
    is_export,
    layouts_for,
    num_anchors,
    open_export,
    require_layout,
    weights_to_fetch,
    write_export,
)

__all__ = [
    "LAYOUTS",
    "Export",
    "Support",
    "Traits",
    "is_export",
    "layouts_for",
    "loads_in",
    "model_card",
    "num_anchors",
    "open_export",
    "require_layout",
    "weights_to_fetch",
    "write_export",
]
