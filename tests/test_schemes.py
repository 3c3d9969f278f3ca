"""What a quantization_config may say: every key that is not understood is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quantising import WAYS, W, refusal


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format: nvfp4-pack-quantized"),
        ({"format": "float-quantized"}, "format: float-quantized, type int"),
        ({"format": "marlin-24"}, "format: marlin-24"),
        ({"format": None}, "format: None"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        ({"config_groups": []}, "config_groups: []"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16: ['Linear']"),
        ({"weights": {"num_bits": 3}}, "num_bits: 3, type int"),
        ({"weights": {"num_bits": True}}, "num_bits: True, type int"),
        ({"weights": {"type": "float"}}, "format: pack-quantized, type float"),
        ({"weights": {"strategy": "tensor_group"}}, "strategy: tensor_group"),
        ({"weights": {"strategy": ["group"]}}, "strategy: ['group']"),
        ({"weights": {"group_size": 0}}, "group_size: [1, 0]"),
        ({"weights": {"group_size": "8"}}, "group_size"),
        ({"weights": {"actorder": "group"}}, "actorder: group"),
        ({"weights": {"strategy": "tensor", "symmetric": False}}, "symmetric: False"),
        ({"weights": {"symmetric": "no"}}, "symmetric: no"),
    ],
)
def test_compressed_tensors_of_other_kinds_are_refused(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    way = WAYS["packed int4 by groups"]
    config = way.config()
    config["config_groups"]["group_0"]["weights"] |= change.pop("weights", {})
    said = refusal(tmp_path, way.store((16, 64)).named(W), {"quantization_config": config | change})
    assert "quantised (compressed-tensors)" in said and "run_compressed=False" in said and found in said, said


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: [128]"),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "weight_block_size: [128, -1]"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "quant_algo: FP8_PB_WO"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo: NVFP4"),
        ({"quant_method": "mxfp8"}, "(mxfp8)"),
    ],
)
def test_other_schemes_are_refused(config: dict[str, Any], found: str, tmp_path: Path) -> None:
    assert found in refusal(tmp_path, WAYS["fp8 by blocks"].store((200, 320)).named(W), {"quantization_config": config})
