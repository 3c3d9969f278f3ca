"""Weights made of codes and scales: the formula's bits for every format, in any span, in little memory."""

from __future__ import annotations

import base64
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from merging import BF16, INTERPOLATE, merged
from quantising import WAYS, W, Way, shapes_of, whole
from xxhash import xxh3_128

import ggez_merge
from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.read import Files


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_weight_is_what_the_formula_says(way: Way, tmp_path: Path) -> None:
    for number, shape in enumerate(shapes_of(way)):
        stored = way.store(shape)
        folder = write_checkpoint(
            tmp_path / str(number), stored.named(W) | {"norm": np.ones(2, BF16)}, config=stored.config
        )
        checkpoint = open_checkpoint(str(folder))
        assert list(checkpoint.tensors) == [W, "norm"]
        assert (checkpoint.tensors[W].dtype, checkpoint.tensors[W].nominal) == ("F32", "BF16")
        assert whole(checkpoint, W).tobytes() == stored.weight.tobytes()
        assert checkpoint.parameters == stored.weight.size + 2


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_any_span_is_that_of_the_whole(way: Way, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number, shape in enumerate(shapes_of(way)):
        stored = way.store(shape, seed=number)
        folder = write_checkpoint(tmp_path / str(number), stored.named(W), config=stored.config)
        checkpoint = open_checkpoint(str(folder))
        with Files(checkpoint.files) as files:
            for _ in range(30):
                first, end = sorted(random.choice(stored.weight.size + 1, 2, replace=False).tolist())
                span = files.elements(checkpoint.tensors[W], first, end - first)
                assert span.tobytes() == stored.weight.reshape(-1)[first:end].tobytes(), (shape, first, end)


def test_rows_longer_than_what_is_decoded_at_a_time(tmp_path: Path) -> None:
    for name in ("fp8 by blocks", "packed int4 with zeros", "fp8 with one scale"):
        stored = WAYS[name].store((2, 200_000))
        checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / name, stored.named(W), config=stored.config)))
        assert whole(checkpoint, W).tobytes() == stored.weight.tobytes()


@pytest.mark.parametrize("name", ["fp8 by blocks", "fp8 of another format", "fp8 with one scale"])
def test_the_public_function_says_the_same(name: str, tmp_path: Path) -> None:
    stored = WAYS[name].store((300, 200))
    dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}[stored.tensors[""].dtype.name]
    codes = torch.from_numpy(stored.tensors[""].view(np.uint8)).view(dtype)
    scale = torch.from_numpy(stored.tensors[WAYS[name].suffix])
    write_checkpoint(tmp_path / "base", stored.named(W), config=stored.config)
    write_checkpoint(tmp_path / "one", {W: np.zeros((300, 200), BF16)})
    found = merged(tmp_path, INTERPOLATE.replace("0.3", "0"))
    assert found == {W: ("BF16", ggez_merge.dequantize(codes, scale).view(torch.uint8).numpy().tobytes())}


PACKED_BY_COMPRESSED_TENSORS = {  # what release 0.20.0 made of random weights, and the hash of how it unpacked them
    4: (
        {"strategy": "group", "group_size": 16},
        (9, 32),
        (
            "Vkdef#+LcZHHnI)Yamy2uY0SDx~XrE&?wLU`2`OEM@4pfbyQ|Zc9mmyXq05gxhXrMi&j7&FaN1LU-$5+5BvyD0RI0E"
            "cJG~Cz5M_9TQC9t`VRwV|Nfw8Z~OZ8_^&O1_~)d)|M&a<^?!T+eK*XRm`e_o$WLQ-NyHYXpqIY{(4q4L5nYG<4MzG(",
            "P(GSIg+97H$UewEhCbar6F!1I+dbkvT0S;DpFTZ4UOpZ^",
            "s%LtOcXyk51^@s62mk;8",
        ),
        "bb9430927cf7134c8676f7536a421218",
    ),
    8: (
        {"strategy": "channel"},
        (5, 30),
        (
            "^2d*fwYhj~kJPW^$=-OG(zmxlnxDeQy2_nZ+}i*E0u}-Q@J%H|{~-W6a=si`V*mi4!~k}<2LP0M0I~o8eFh>rengOR"
            "U~vG2Mnp{wl0{p3Qe;wDoP%sgIB5U?00930|Nj600FwX!0RKw=|Nn~s0RI4e|NpQ5lm7q!mSg`y#Nwn#lHvbtf~GiZ"
            "w6N^Ql&EY#rTyQdR)PQk",
            "t~@0?%{&4-k~{",
            "uuxvJssI20",
        ),
        "5642f33c9fa431c11899382c371142f4",
    ),
}


@pytest.mark.parametrize("bits", PACKED_BY_COMPRESSED_TENSORS)
def test_what_compressed_tensors_packed(bits: int, tmp_path: Path) -> None:
    args, shape, raw, digest = PACKED_BY_COMPRESSED_TENSORS[bits]
    parts = args.get("group_size", shape[1])
    wide = -(-shape[0] * bits // 32), shape[1] // parts
    packed, scale, zero = (base64.b85decode(text) for text in raw)
    arrays = {
        f"{W}_packed": np.frombuffer(packed, "i4").reshape(shape[0], -1),
        f"{W}_scale": np.frombuffer(scale, BF16).reshape(shape[0], -1),
        f"{W}_zero_point": np.frombuffer(zero, "i4").reshape(wide),
        f"{W}_shape": np.array(shape),
    }
    weights = {"num_bits": bits, "type": "int", "symmetric": False, **args}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    write_checkpoint(tmp_path, arrays, config={"quantization_config": config})
    found = whole(open_checkpoint(str(tmp_path)), W)
    assert found.shape == shape
    assert xxh3_128(found.astype(BF16).tobytes()).hexdigest() == digest


@pytest.mark.parametrize("name", ["fp8 by blocks", "packed int4 with zeros"])
@pytest.mark.parametrize("shape", [(1, 1 << 22), (1 << 12, 1 << 10)])
def test_what_is_needed_besides_the_result_is_bounded(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    stored = WAYS[name].store(shape)
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, stored.named(W), config=stored.config)))
    with Files(checkpoint.files) as files:
        files.elements(checkpoint.tensors[W], 0, 1)
        out = bytearray(checkpoint.tensors[W].nbytes)
        tracemalloc.start()
        files.read(checkpoint.tensors[W], 0, memoryview(out))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20
    assert out == stored.weight.tobytes()
