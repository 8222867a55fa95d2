"""Weights that are replaced in a model that runs, and put back bit for bit, whatever kernels made of them.

On a CPU layers may run on copies of their weights in another order, or on sums of them, and have no weight of
their own any more. On a GPU recorded graphs and compiled code read weights where they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError

State = tuple[Tensor | None, list[Any]]  # of a layer: its weight, and what is made of it


class Made:
    """What `make` makes of a layer's weight: what a forward reads in place of it, as `value`.

    `dense` gives the weight back for layers that keep no other copy, if not exactly then to rounding; it may
    be a matrix. `plus` adds a product of two float32 matrices to what was made of a float32 weight; None
    where it cannot.
    """

    def __init__(
        self,
        layer: nn.Module,
        make: Callable[[Tensor], Any],
        dense: Callable[[Any], Tensor] | None = None,
        plus: Callable[[Any, Tensor, Tensor], Any | None] | None = None,
    ):
        self.make, self.dense = make, dense
        self.plus = plus if layer.weight.dtype == torch.float32 else None
        self.value = make(layer.weight.detach())
        vars(layer).setdefault("made_of_weight", []).append(self)


def after_replacing(layer: nn.Module, refresh: Callable[[], None]) -> None:
    """Call `refresh` whenever the layer's weight has been replaced."""
    vars(layer).setdefault("after_replacing", []).append(refresh)


class Replaceable:
    """A weight of a layer, which is there whether or not the layer's kernels have kept it.

    With `in_place` the weight stays at its address, and a copy of the original is kept; else the original
    itself is, in the form that the layer has it in. InputError for a network that another library has
    compiled, constants included.
    """

    def __init__(self, layer: nn.Module, name: str, shape: tuple[int, ...], in_place: bool):
        self.layer, self.name, self.shape, self.in_place = layer, name, shape, in_place
        self.made: list[Made] = vars(layer).get("made_of_weight", []) if name == "weight" else []
        weight, values = self.state()
        if weight is not None and weight.is_meta:
            raise InputError("a LoRA cannot change a model compiled for this CPU: leave --compile out")
        self.original = (weight.clone() if in_place and weight is not None else weight), values

    @property
    def is_kept(self) -> bool:
        """Whether the layer has its weight as it is; if not, `plain` is a new tensor each time."""
        return self.original[0] is not None

    @property
    def plain(self) -> Tensor:
        """The original weight, of the layer's shape."""
        weight, values = self.original
        if weight is not None:
            return weight
        dense, value = next((m.dense, v) for m, v in zip(self.made, values, strict=True) if m.dense)
        return dense(value).reshape(self.shape)

    def replace(self, weight: Tensor) -> None:
        """Let the layer compute with `weight`, of the shape, type and device of `plain`."""
        self._write(weight)
        for made in self.made:
            made.value = made.make(weight)

    @property
    def takes_products(self) -> bool:
        """Whether `add_product` is worth its factors: kernels have float32 weights alone, and add to them."""
        return not self.is_kept and all(made.plus for made in self.made)

    def add_product(self, up: Tensor, down: Tensor) -> bool:
        """Let the layer, which `takes_products`, compute with its own weight plus up [rows, r] @ down [r, i].

        False, and nothing is changed, where that needs the weight itself: take `plain` and `replace` then.
        """
        sums = [made.plus(value, up, down) for made, value in zip(self.made, self.original[1], strict=True)]
        if any(one is None for one in sums):
            return False
        for made, one in zip(self.made, sums, strict=True):
            made.value = one
        return True

    def state(self) -> State:
        """What the layer computes with right now, for `put_back`; overwritten by `replace` if `in_place`."""
        parameter = getattr(self.layer, self.name)
        return None if parameter is None else parameter.data, [made.value for made in self.made]

    def put_back(self, state: State) -> None:
        weight, values = state
        if weight is not None:
            self._write(weight)
        for made, value in zip(self.made, values, strict=True):
            made.value = value

    def restore(self) -> None:
        """Let the layer compute with its own weight."""
        self.put_back(self.original)

    def _write(self, weight: Tensor) -> None:
        parameter = getattr(self.layer, self.name)
        if parameter is None:
            return
        if self.in_place:
            parameter.data.copy_(weight)
        else:
            parameter.data = weight
        for refresh in vars(self.layer).get("after_replacing", ()):
            refresh()
