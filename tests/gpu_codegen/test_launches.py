"""What the production launchers ask of a GPU: what they cover, what Triton learns from it, how often it compiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import torch
from calls import CALLS, EFFECTS, EVEN, KEYS, launches_of
from offsets import int32_offsets
from recording import Launch, recording

from ggez_kernels.gpu import drop, gram, linear, threshold, vote
from ggez_kernels.gpu.launch import WIDEST
from ggez_kernels.sparsify import CHUNK, Sparsify

TARGET = "sm_90"
MOST_PROGRAMS = 2**31 - 1  # in a grid's first dimension
HUGE = 2**31 + 33  # elements: neither an int32 nor a multiple of 16
SIZES = (1, 15, 16, 17, 1023, 1024, 4097, CHUNK, CHUNK + 16, 2 * CHUNK + 5)

EVERY_CALL = pytest.mark.parametrize("name", CALLS)


def tensor(size: int, offset: int = 0) -> torch.Tensor:
    """`size` elements, `offset` beyond an address that is a multiple of 16; untouched, they take no memory."""
    return torch.empty(size + offset, dtype=torch.bfloat16)[offset:]


def sweeps(name: str, launches: list[Launch]) -> list[Launch]:
    """The launches that go over everything: the search of one block for the n-th tie does not."""
    return launches[:-1] if name == "nth tie" else launches


def span(launch: Launch) -> tuple[int, int]:
    """The elements [begin, end) that a launch's programs have among them."""
    arguments, (programs, *_) = launch.arguments, launch.grid
    if "begin" in arguments:
        begin, end = arguments["begin"], arguments["end"]
        blocks = -(-(end - begin) // arguments["BLOCK"])
        # the programs of a histogram go on until all is done
        assert programs == (min(blocks, threshold.MOST_PROGRAMS) if launch.name == "_histogram" else blocks)
        return begin, end
    chunks, rest = divmod(programs, arguments.get("pairs", 1))
    assert rest == 0
    begin = arguments["first"] * CHUNK
    return begin, min(begin + chunks * CHUNK, arguments["size"])


def assert_covered(launches: Sequence[Launch], size: int) -> None:
    """By spans one after the other."""
    edges = [edge for launch in launches for edge in span(launch)]
    assert edges[0] == 0
    assert edges[1:-1:2] == edges[2::2]
    assert edges[-1] == size


@EVERY_CALL
@pytest.mark.parametrize("size", SIZES)
def test_every_element_is_covered_once(name: str, size: int) -> None:
    for offset in (0, 1, 8):
        with recording(TARGET, EFFECTS) as launches:
            CALLS[name](*(tensor(size, offset) for _ in range(3)))
        launches = sweeps(name, launches)
        assert_covered(launches, size)
        narrow = size
        for launch in launches:
            begin, end = span(launch)
            if launch.arguments["ALIGNED"]:
                assert begin % 16 == end % 16 == 0
                narrow -= end - begin
        is_aligned = offset * 2 % WIDEST == 0
        by_chunks = "BLOCK" not in launches[0].arguments
        assert narrow == size if not is_aligned else narrow == size % 16 or (by_chunks and narrow == size % CHUNK)


@EVERY_CALL
def test_nothing_is_launched_for_nothing(name: str) -> None:
    with recording(TARGET) as launches:
        if name == "nth tie":
            with pytest.raises(IndexError):
                CALLS[name](*(tensor(0) for _ in range(3)))
        else:
            CALLS[name](*(tensor(0) for _ in range(3)))
    assert not launches


@EVERY_CALL
def test_alignment_is_claimed_of_aligned_addresses(name: str) -> None:
    """Triton is told nothing of addresses but by `ALIGNED`: one tensor out of line is enough for its absence."""
    for odd in (None, 0, 1, 2):
        tensors = [tensor(EVEN, offset=1 if place == odd else 0) for place in range(3)]
        with recording(TARGET, EFFECTS) as launches:
            CALLS[name](*tensors)
        for launch in sweeps(name, launches):
            table = launch.arguments["table"].tolist() if "table" in launch.arguments else []
            numbers = {*table, *(value for value in launch.arguments.values() if isinstance(value, int))}
            used = [each for each in tensors if each.data_ptr() in numbers]
            assert len(used) >= 2
            assert launch.arguments["ALIGNED"] == all(each.data_ptr() % WIDEST == 0 for each in used)
            assert not any(launch.kernel.src.attrs.values())


def binaries(launches: Sequence[Launch]) -> dict[str, int]:
    """How many were compiled of each kernel; one for the bulk and one for the end count as one."""
    found: dict[tuple[str, bool], set[int]] = defaultdict(set)
    for launch in launches:
        found[launch.name, launch.arguments.get("ALIGNED", False)].add(id(launch.kernel))
    return {name: max(len(found[name, wide]) for wide in (False, True)) for name, _ in list(found)}


def untouched(turn: int) -> None:
    return None


def trim(turn: int) -> Sparsify:
    return Sparsify(threshold=turn * 16 + 1, last=2**turn, rescale=1.0 + turn)


def random_drop(turn: int) -> Sparsify:
    return Sparsify(keep=0.1 * (turn % 9), seed=2**59 * turn + 1, rescale=2.0)


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("how", [untouched, trim, random_drop])
def test_a_sweep_of_weights_and_models_compiles_once(how: Callable[[int], Sparsify | None], has_base: bool) -> None:
    with recording(TARGET) as launches:
        for turn, (models, size) in enumerate([(2, 4096), (3, 17), (8, 4097), (17, 1), (2, 2**20 + 16)]):
            x, out = tensor(size), tensor(size)
            xs = [x] * models
            hows = [how(turn + k) for k in range(models)] if has_base else None
            start = (0, 1, 16, 2**31, 2**40 + 16)[turn]
            rows = [[ratio] * models for ratio in (0.0, 0.05, 0.25, 0.5, 1.0, -1.0)]
            for row in rows:
                linear.linear(out, x if has_base else None, xs, row, sparsify=hows, start=start)
            linear.linear_many([out] * len(rows), x if has_base else None, xs, rows, sparsify=hows, start=start)
    assert binaries(launches) == {"_mix": 1}


def test_a_sweep_of_ratios_compiles_once() -> None:
    ratios = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    with recording(TARGET) as launches:
        for size in (4097, 2**20, 16, 1):
            x, out = tensor(size), tensor(size)
            for ratio in ratios:
                linear.linear(out, x, [x], [ratio], start=size)
            linear.linear_many([out] * len(ratios), x, [x], [[ratio] for ratio in ratios])
    assert binaries(launches) == {"_interpolate": 1}


def test_a_sweep_of_votes_compiles_once() -> None:
    with recording(TARGET) as launches:
        for turn, (models, size) in enumerate([(2, 4097), (3, 16), (8, 1), (17, 2**20)]):
            x, out = tensor(size), tensor(size)
            hows = [trim(turn + k) for k in range(models)]
            for scale in (0.0, 0.5, 1.0, 16.0):
                vote.vote(out, x, [x] * models, [scale] * models, sparsify=hows, start=turn << 31, scale=scale)
    assert binaries(launches) == {"_vote": 1}


def test_measuring_compiles_once() -> None:
    with recording(TARGET, EFFECTS) as launches:
        for size in (1, 16, 4097, 2**20 + 16):
            x = tensor(size)
            for key in (0, 1, 16, 12345, KEYS - 2048):
                threshold.histogram(x, x, low=key, high=key + 2048)
                threshold.histogram(x, x, low=0, high=KEYS, shift=20)
                threshold.ties(x, x, key)
                threshold.nth_tie(x, x, key, 0)
            for models in (1, 2, 17):
                gram.gram([x] * models, x, start=0)
            for turn in range(4):
                drop.l1(x, x, trim(turn), start=turn << 31)
    assert binaries(launches) == dict.fromkeys(("_histogram", "_tie_counts", "_find_tie", "_gram", "_l1"), 1)


def test_another_dtype_is_another_binary() -> None:
    """So that the counts above can tell."""
    launches = [
        launch for dtype in (torch.bfloat16, torch.float32) for launch in launches_of(CALLS["gram"], TARGET, dtype)
    ]
    assert binaries(launches) == {"_gram": 2}


@EVERY_CALL
def test_more_elements_than_an_int32_holds(name: str) -> None:
    """In virtual memory that nobody touches: grids reach the last element, and no binary of its own is compiled."""
    huge = tensor(HUGE)
    with recording(TARGET, EFFECTS) as launches:
        CALLS[name](huge, huge, huge)
    assert_covered(sweeps(name, launches), HUGE)
    few = launches_of(CALLS[name], TARGET, torch.bfloat16, EVEN + 1)
    assert {id(launch.kernel) for launch in launches} <= {id(launch.kernel) for launch in few}
    for launch in launches:
        assert launch.grid[0] <= MOST_PROGRAMS
        assert launch.grid[1:] == (1, 1)
        assert not int32_offsets(launch.kernel.asm["ttir"])
