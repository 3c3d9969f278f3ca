"""GG-EZ: merge a global model with its region-tuned copies.

The functions on tensors are imported when they are asked for: they need torch, and the command line does not.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "linear", "merge_into", "task_arithmetic", "ties"]

if TYPE_CHECKING:
    from ggez_merge.live import merge_into
    from ggez_merge.tensors import linear, task_arithmetic, ties
else:

    def __getattr__(name: str) -> Any:
        if name == "merge_into":
            from ggez_merge.live import merge_into

            return merge_into
        if name in __all__:
            from ggez_merge import tensors

            return getattr(tensors, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
