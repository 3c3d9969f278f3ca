"""GG-EZ: merge a global model with its region-tuned copies.

The functions on tensors are imported when they are asked for: they need torch, and the command line does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "dequantize", "linear", "merge_into", "task_arithmetic", "ties"]

if TYPE_CHECKING:
    from ggez_merge.live import merge_into
    from ggez_merge.quantized import dequantize
    from ggez_merge.tensors import linear, task_arithmetic, ties
else:
    _HOMES = {"dequantize": "quantized", "merge_into": "live"}

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(import_module(f"ggez_merge.{_HOMES.get(name, 'tensors')}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
