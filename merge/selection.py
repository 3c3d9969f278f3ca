"""What a key of a recipe's `components:` selects.

- a component, `vision_tower`, as `ggez-merge inspect` lists them, or `norms`: the normalisation layers of all of them;
- layers of a component, both ends included: `language_model.layers.0-7`, `vision_tower.layers.3`. Where a component has
  several stacks of layers, the stack's own name instead of `layers`: `unet.down_blocks.0-1`;
- blocks of a diffusion model's UNet, in either layout: `unet.IN04`, `unet.IN04-08`, `unet.M00`, `unet.OUT00-02`, and
  `BASE`: the text encoders and what else of the UNet is in none of them;
- anything else is a glob over tensor names, or a tensor's whole name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from ggez_merge.check import listed, nearest
from ggez_merge.components import COMPONENTS, component, is_norm, layer

NORMS = "norms"
NAMES = (*COMPONENTS, NORMS)
ANY_STACK = "layers"
NO_BLOCKS: Mapping[str, str] = MappingProxyType({})
BASE = "BASE"
_BLOCKS = re.compile(r"unet\.(?P<stack>IN|M|OUT)(?P<first>[0-9]{2})(?:-(?P<last>[0-9]{2}))?|BASE")
_KEY = re.compile(r"(?P<part>\w+)(?:\.(?P<stack>\w+)\.(?P<first>[0-9]{1,6})(?:-(?P<last>[0-9]{1,6}))?)?")


@dataclass(frozen=True)
class Selection:
    """One key, understood. part: the component, None for a glob; stack: None for all of the component.

    blocks: for blocks of a UNet, which tensor lies in which ("IN04", "BASE").
    """

    key: str
    part: str | None = None
    stack: str | None = None
    first: int = 0
    last: int = 0
    blocks: Mapping[str, str] | None = None

    def takes(self, name: str) -> bool:
        """Whether it selects this tensor."""
        if self.part is None:
            return fnmatchcase(name, self.key)
        if self.part == NORMS:
            return is_norm(name)
        if self.part == BASE:
            return self.blocks is not None and self.blocks.get(name) == BASE
        if self.stack is None:
            return component(name) == self.part
        number = self._number(name)
        return number is not None and self.first <= number <= self.last

    def names(self, name: str) -> bool:
        """Whether it selects this tensor as one of a certain part, and not as one of whatever ends or is called so."""
        return self.takes(name) and self.part != NORMS and self.key[:1] not in ("*", "?", "[")

    def position(self, name: str) -> float | None:
        """Where a layer that it takes stands in its range, 0 for the first and 1 for the last; None without a range."""
        number = self._number(name) if self.stack is not None else None
        if number is None:
            return None
        return (number - self.first) / (self.last - self.first) if self.last > self.first else 1.0

    def fault(self, names: Collection[str]) -> str | None:
        """What is wrong with its range of layers for a model of these tensors."""
        if self.stack is None:
            return None
        if self.first > self.last:
            return "the range of layers ends before it begins"
        inside = [(name, number) for name in names if (number := self._number(name)) is not None]
        stacks = {place[0] for name, _ in inside if (place := layer(name))}
        if len(stacks) > 1 and self.blocks is None:
            return f"{self.part} has several stacks of layers: {listed(sorted(stacks))}"
        numbers = {number for _, number in inside}
        if numbers and not numbers.issuperset(range(self.first, self.last + 1)):
            if self.blocks is not None:
                return f"the UNet has the blocks {self.stack}{min(numbers):02} to {self.stack}{max(numbers):02}"
            return f"{self.part} has the layers {min(numbers)} to {max(numbers)}"
        return None

    def _number(self, name: str) -> int | None:
        """The layer's number, for a tensor in a stack that the key means."""
        if self.blocks is not None:
            stack, number = _split_block(self.blocks.get(name, ""))
            return number if stack == self.stack else None
        place = layer(name)
        if place is None or component(name) != self.part:
            return None
        return place[1] if self.stack in (ANY_STACK, place[0].rpartition(".")[2]) else None


def _split_block(block: str) -> tuple[str, int]:
    """ "OUT04" -> ("OUT", 4)."""
    stack = block.rstrip("0123456789")
    return stack, int(block[len(stack) :] or 0)


def read_selection(key: str, blocks: Mapping[str, str] = NO_BLOCKS) -> Selection:
    """Every key means something: what is neither a component nor layers of one is a glob.

    blocks: the UNet's, by tensor (`diffusion.blocks`).
    """
    match = _BLOCKS.fullmatch(key)
    if match is not None and match["stack"] is None:
        return Selection(key, BASE, blocks=blocks)
    if match is not None:
        first = int(match["first"])
        return Selection(key, "unet", match["stack"], first, int(match["last"] or first), blocks)
    match = _KEY.fullmatch(key)
    if match is None or match["part"] not in NAMES or (match["stack"] and match["part"] == NORMS):
        return Selection(key)
    first = int(match["first"] or 0)
    return Selection(key, match["part"], match["stack"], first, int(match["last"] or first))


def remedy(selection: Selection, names: Collection[str]) -> str:
    """What to do about a key that reaches none of these tensors."""
    there = {component(name) for name in names}
    here = [part for part in COMPONENTS if part in there]
    has = f"the components here are {listed(here)}; of several lines the first wins"
    if selection.part is not None:
        return has
    if re.search(r"[*?\[]", selection.key):
        return "`ggez-merge inspect MODEL --tensors` lists the names; of several lines the first wins"
    near = nearest(selection.key.partition(".")[0], [*here, NORMS])
    return f"{near} {has}" if near else has
