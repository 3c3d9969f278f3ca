"""PEFT adapters for tests: made and merged by PEFT itself, or written by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers as tf
from checkpoints import write_file

State = dict[str, torch.Tensor]


def draw(parameter: torch.Tensor, generator: torch.Generator, dyadic: bool) -> None:
    """Random values; dyadic ones are such that sums of a few of their products are exact in float32."""
    with torch.no_grad():
        if dyadic:
            parameter.copy_(torch.randint(-16, 17, parameter.shape, generator=generator) / 16)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def save_base(model: tf.PreTrainedModel, folder: Path, dyadic: bool = True) -> Path:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        draw(parameter, generator, dyadic)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, kind: type[Any], folder: Path, dyadic: bool = True, seed: int = 2, **config: Any) -> Path:
    """An adapter of the model in `base` that changes all that PEFT would train under this config, as PEFT saves it."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(**config))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in name:
                    draw(parameter, generator, dyadic)
                    parameter.data.abs_().add_(0.5)
                else:
                    draw(parameter, generator, dyadic)
        model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, kind: type[Any], adapter: Path, dtype: torch.dtype = torch.float32) -> State:
    """The weights of merge_and_unload, computed in `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(kind.from_pretrained(base).to(dtype), adapter)
        merged: State = model.to(dtype).merge_and_unload().state_dict()
    return merged


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray[Any, Any]], **config: Any) -> Path:
    """An adapter folder with these tensors, named without `base_model.model.`, and this config."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    write_file(folder / "adapter_model.safetensors", named)
    return folder


def pair(module: str, out: int, into: int, rank: int = 2, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A and B of one linear module."""
    random = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": random.normal(size=(rank, into)).astype("f4"),
        f"{module}.lora_B.weight": random.normal(size=(out, rank)).astype("f4"),
    }
