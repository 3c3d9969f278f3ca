"""Whether a kernel computes offsets in 32 bits, which a tensor of 2**31 elements overflows."""

from __future__ import annotations

import re

# what cannot grow with the number of programs any more, or is a number of 64 bits
_HARMLESS = ("arith.extsi", "arith.remsi", "arith.cmpi", "tt.load")


def int32_offsets(ttir: str) -> list[str]:
    """The multiplications of something that comes from the program's number and is still an int32."""
    grown: set[str] = set()
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w-]+) = \"?([\w.]+)\"?(.*)", line)
        if not match:
            continue
        result, operation, rest = match.groups()
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            grown.add(result)
        elif operation not in _HARMLESS and grown & set(re.findall(r"%[\w-]+", rest)):
            grown.add(result)
            if operation in ("arith.muli", "arith.shli") and re.search(r": (tensor<[\dx]+x)?i32\b", rest):
                found.append(line.strip())
    return found
