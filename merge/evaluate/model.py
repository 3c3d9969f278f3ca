"""A model that is ready to be asked: a checkpoint's weights in transformers, with its tokenizer and image processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from ggez_merge.errors import Problem, Refused

SIGLIP = ("siglip", "siglip2")


@dataclass(frozen=True)
class Live:
    """A model in evaluation mode and what stands around it.

    kind: "dual" (an image and a text encoder) or "generative" (a language model, with images or without). processor:
    what turns chats with images into inputs; None: the model reads text only. unused: weights of the checkpoint that
    transformers has no place for.
    """

    model: Any
    tokenizer: Any
    image_processor: Any | None
    processor: Any | None
    kind: str
    unused: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs where the model is; numbers with a fraction in its dtype."""

        def moved(value: torch.Tensor) -> torch.Tensor:
            return value.to(self.device, self.model.dtype if value.is_floating_point() else None)

        return {key: moved(value) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def load_model(folder: Path, device: str | None = None, dtype: str | None = None) -> Live:
    """The model of a checkpoint folder, whose config says which class it is.

    device: "cpu" if None. dtype: "float32", "bfloat16" …; None: as the weights are stored. Nothing is downloaded and no
    code from the folder is run. Raises Refused if the folder lacks weights, a tokenizer or a processor, or if its
    model is neither a dual encoder nor generative.
    """
    config = _from(folder, "config.json", transformers.AutoConfig)
    loader, kind = _class(folder, config)
    with _quiet():
        model, found = _from(
            folder, "the weights", loader, config=config, dtype=dtype or "auto", output_loading_info=True
        )
    lost = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if lost:
        what = "weights are missing or have another shape than config.json says"
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise Refused(Problem(what, str(folder), found=", ".join(map(str, sorted(lost)[:3])) + more))
    sees = kind == "dual" or hasattr(config, "vision_config")
    processor = _from(folder, "its processor", transformers.AutoProcessor) if sees else None
    tokenizer = processor.tokenizer if processor else _from(folder, "its tokenizer", transformers.AutoTokenizer)
    return Live(
        model=model.to(device or "cpu").eval(),
        tokenizer=tokenizer,
        image_processor=processor.image_processor if processor else None,
        processor=processor,
        kind=kind,
        unused=tuple(sorted(found["unexpected_keys"])),
    )


def _class(folder: Path, config: Any) -> tuple[Any, str]:
    """What loads a model of this config, and its kind."""
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        raise _unsuited(folder, config)
    if config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText, "generative"
    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM, "generative"
    model_class = auto.MODEL_MAPPING.get(type(config), None)
    if all(hasattr(model_class, name) for name in ("get_image_features", "get_text_features")):
        return transformers.AutoModel, "dual"
    raise _unsuited(folder, config)


def _unsuited(folder: Path, config: Any) -> Refused:
    return Refused(
        Problem(
            "no task is known for a model of this kind",
            str(folder / "config.json"),
            expected="a dual encoder such as CLIP or SigLIP, or a decoder that generates text",
            found=config.model_type,
            remedy="evaluate it with a program of your own: `command:`",
        )
    )


def _from(folder: Path, what: str, loader: Any, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers raises whatever it stumbles over
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"transformers cannot load {what}"
        remedy = "the folder needs the files that the global model came with: config, tokenizer, processor"
        raise Refused(Problem(what, str(folder), found=first, remedy=remedy)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar of transformers: a sweep has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Inference that gives the same numbers each time: no autotuning, no TF32, deterministic kernels where they exist.

    What was set before is set again afterwards.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, False, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.inference_mode():
            yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
