"""How fast a merge can be: the bytes it moves, over the bandwidth of everything they go through.

    ggez-merge bench roofline [--csv FILE]

Disk, bus and memory work at the same time, so a merge of n parameters takes at least

    seconds = max over resources r of n * bytes_r / bandwidth_r

and the resource of the maximum *binds*. Nothing here is measured, and no compute counts: it is a bound, and says what
no other device improves on. With I inputs and O outputs, e bytes an element (2: bfloat16), S passes over the inputs
from the disk (2 where a method measures before it combines), and M arrays that the measuring kernels read (SLERP's Gram
matrix: all inputs; TIES: base and model, for each model and each sweep of the search for its threshold):

    disk     e (S I + O)                            read, and written
    bus      e max(S I, O)                          to the device and back: both directions at once; GPUs only
    memory   e (S I + (M + I + O) + O)              what arrives, what the kernels read and write, what leaves

`kept` is data that are in the device's memory already (a live model, a sweep): no disk, no bus, kernels alone. `warm`
inputs are in the page cache, and only the output goes to the disk, at 7 GB/s. A sweep of 11 reads its inputs once.

Bandwidths, as the makers state them; what programs get is some 80 to 95 % of that:

- nvme 3, nvme 7: GB/s of a drive on PCIe 3 x4 or 4 x4 (Samsung 970 PRO: 3.5; 990 PRO: 7.45 read, 6.9 written);
- pcie 4, pcie 5: x16 lanes at 16 or 32 GT/s, 128 of 130 bits are data: 31.5 and 63.0 GB/s each way (PCI-SIG);
- H100: 3350 GB/s (NVIDIA H100 SXM5 datasheet, HBM3);
- server: 460.8 GB/s (AMD EPYC 9004, 12 channels of DDR5-4800); desktop: 76.8 (2 channels of DDR5-4800).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .table import save

ITEM_BYTES = 2
PARAMETERS = (7_000_000_000, 27_000_000_000)
NVME_3, NVME_7 = 3e9, 7e9
PCIE_4, PCIE_5 = 31.5e9, 63.0e9
STORAGE = {"nvme 3": NVME_3, "nvme 7": NVME_7, "warm": NVME_7, "kept": None}


@dataclass(frozen=True)
class Method:
    """Arrays read from the disk, written to it, and read once to measure; `trimmed` models need a threshold."""

    inputs: int
    outputs: int = 1
    measured: int = 0
    trimmed: int = 0

    @property
    def passes(self) -> int:
        return 2 if self.measured or self.trimmed else 1


METHODS = {
    "linear": Method(inputs=2),  # of two models, or a base and a ratio
    "11 ratios": Method(inputs=2, outputs=11),
    "task arithmetic": Method(inputs=3),  # this and what follows: a base and two models
    "DARE": Method(inputs=3),
    "TIES": Method(inputs=3, trimmed=2),
    "SLERP": Method(inputs=2, measured=2),  # a base and one model
}


@dataclass(frozen=True)
class Machine:
    """Bytes a second; `bus` is None where the data are computed on in the memory they arrive in.

    sweeps: how often the search for a threshold reads a tensor, at most.
    """

    memory: float
    sweeps: float
    bus: float | None = None


SAMPLED = 1 / 16 + 1 + 1  # a sample, a count of the keys near, and the last of the equal ones
RADIX = 3 + 1  # digits of 11, 10 and 10 bits, and the last of the equal ones
MACHINES = {
    "desktop": Machine(memory=76.8e9, sweeps=SAMPLED),
    "server": Machine(memory=460.8e9, sweeps=SAMPLED),
    "H100 PCIe 4": Machine(memory=3350e9, sweeps=RADIX, bus=PCIE_4),
    "H100 PCIe 5": Machine(memory=3350e9, sweeps=RADIX, bus=PCIE_5),
}


@dataclass(frozen=True)
class Bound:
    """Seconds that each resource needs at least."""

    disk_s: float
    bus_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        return max(self.disk_s, self.bus_s, self.memory_s)

    @property
    def binds(self) -> str:
        return max(("disk", self.disk_s), ("bus", self.bus_s), ("memory", self.memory_s), key=lambda pair: pair[1])[0]


def bound(method: Method, machine: Machine, storage: str, n_parameters: int) -> Bound:
    """The formulas above."""
    n_bytes = ITEM_BYTES * n_parameters
    disk = STORAGE[storage]
    kernels = method.measured + 2 * method.trimmed * machine.sweeps + method.inputs + method.outputs
    if disk is None:
        return Bound(0.0, 0.0, n_bytes * kernels / machine.memory)
    arriving = method.passes * method.inputs
    from_disk = 0 if storage == "warm" else arriving
    return Bound(
        disk_s=n_bytes * (from_disk + method.outputs) / disk,
        bus_s=n_bytes * max(arriving, method.outputs) / machine.bus if machine.bus else 0.0,
        memory_s=n_bytes * (arriving + kernels + method.outputs) / machine.memory,
    )


def rows() -> Iterator[dict[str, Any]]:
    """Every method, size, storage and machine."""
    for name, method in METHODS.items():
        for n_parameters in PARAMETERS:
            for storage in STORAGE:
                for machine_name, machine in MACHINES.items():
                    limit = bound(method, machine, storage, n_parameters)
                    yield {
                        "method": name,
                        "parameters": n_parameters,
                        "storage": storage,
                        "machine": machine_name,
                        "read_bytes_per_parameter": ITEM_BYTES * method.passes * method.inputs,
                        "written_bytes_per_parameter": ITEM_BYTES * method.outputs,
                        "disk_s": f"{limit.disk_s:.3f}",
                        "bus_s": f"{limit.bus_s:.3f}",
                        "memory_s": f"{limit.memory_s:.3f}",
                        "seconds": f"{limit.seconds:.3f}",
                        "binds": limit.binds,
                    }


def bench(csv: Path | None = None) -> None:
    """Show a table for each size: seconds, and what binds."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for n_parameters in PARAMETERS:
        title = f"least seconds for {n_parameters / 1e9:g} B parameters in bfloat16, and what binds"
        table = Table("method", "data", *MACHINES, title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name, method in METHODS.items():
            for storage in STORAGE:
                limits = [bound(method, machine, storage, n_parameters) for machine in MACHINES.values()]
                table.add_row(name, storage, *(f"{limit.seconds:.3g} {limit.binds}" for limit in limits))
        console.print(table)
    if csv is not None:
        save(list(rows()), csv)
