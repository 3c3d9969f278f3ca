"""State dicts and their bytes, for tests."""

from __future__ import annotations

from typing import Any

import torch

StateDict = dict[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def bytes_of(state: Any) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in state.items()}
