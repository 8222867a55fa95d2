"""LoRA files: what they add to the weights of a model.

    LoRA    up down                       Hu et al. 2021, https://arxiv.org/abs/2106.09685
    LoCon   the same of convolutions, with a kernel in the middle (Tucker, or CP, decomposition)
    LoHa    (a b) * (c d), elementwise    Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098
    LoKr    a Kronecker product           Yeh et al. 2023, https://arxiv.org/abs/2309.14859
    DoRA    any of them, the sum's rows (or columns) scaled to a length of their own
                                          Liu et al. 2024, https://arxiv.org/abs/2402.09353

The header of a file says which layers it is for; the values are read when they are merged.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.weights import lora_names
from ldm.weights.diffusers_layout import read_json
from ldm.weights.files import exists, user_file
from ldm.weights.header import Header, read_header
from ldm.weights.lora_names import PartsError, Shape, Target
from ldm.weights.unpickle import check_stored

if TYPE_CHECKING:
    from torch import Tensor

RANK = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # parts whose first axis is the rank
ADVICE = "modelspec.usage_hint"  # of the metadata
# what decides alpha / rank of peft's settings
SCALE_SETTINGS = ("r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern")
REPEATS, CHOICES = 3, 16  # of a pattern of a layer's name: with more of them a search may take forever
EPSILON = 2.0**-23  # LyCORIS adds it to the lengths that it divides by


@dataclass(frozen=True)
class Match:
    """The layers of a file that a model has."""

    layers: Mapping[str, Target]  # by the file's names of them
    total: int  # layers in the file
    left_out: tuple[str, ...]  # names in the file that are for nothing in the model, or do not fit
    notice: str  # how many these are, in words

    @property
    def for_text(self) -> bool:
        return any(target.name.startswith(lora_names.TEXT) for target in self.layers.values())


@dataclass(eq=False)
class LoraFile:
    """A LoRA file as it was when its header was read. InputError if it is missing, damaged, or no LoRA."""

    path: Path
    header: Header = field(init=False)

    def __post_init__(self) -> None:
        self.state = self._state_now()
        self.finite: set[str] = set()  # layers whose values have been looked at
        self.header = read_header(self.path)
        check_stored(self.path, self.header.tensors)
        try:
            self.layers, self.unknown = lora_names.layers_of(self.header.tensors)
        except PartsError as error:
            raise InputError(f"{self.path} {error}") from error
        if not self.layers:
            from ldm.weights.families import family_of, in_words

            what = (
                in_words(family_of(self.header.tensors)) if self.header.tensors else "a file without weights"
            )
            raise InputError(f"{self.path} holds no LoRA that is known here; it looks like {what}")
        self._peft_settings = self._read_settings()

    def _state_now(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Time of change, size and inode of the file, and of the settings that peft keeps beside it."""
        files = [self.path]
        if self.path.stem == "adapter_model":
            files.append(self.path.with_name("adapter_config.json"))
        found = []
        for file in files:
            with user_file(file):
                status = file.stat() if file.exists() else None
            found.append(status and (status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)

    @property
    def has_changed(self) -> bool:
        """Whether the file is another one by now, or gone."""
        return self._state_now() != self.state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int] | None]:
        """Rows and columns of what is added to each layer's weight; None for the layers in `faults`."""
        return {layer: found for layer, (found, _) in self._checked.items()}

    @cached_property
    def faults(self) -> dict[str, PartsError]:
        """The layers that are incomplete, or whose parts do not fit each other."""
        return {layer: fault for layer, (_, fault) in self._checked.items() if fault}

    @cached_property
    def _checked(self) -> dict[str, tuple[tuple[int, int], None] | tuple[None, PartsError]]:
        found = {}
        for layer in self.layers:
            try:
                found[layer] = lora_names.change_shape(self._part_shapes(layer)), None
            except PartsError as fault:
                found[layer] = None, fault
        return found

    def _part_shapes(self, layer: str) -> dict[str, Shape]:
        return {part: self.header.tensors[key].shape for part, key in self.layers[layer].items()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The values, in memory of their own: a mapped file that is overwritten would end the process.

        InputError if the file has changed since its header was read.
        """
        if self.has_changed:
            raise InputError(f"{self.path} has changed while it was in use; start again")
        return self.header.map(copy=True)

    def let_go(self) -> None:
        """Free the memory of the values; they are read again when they are needed."""
        vars(self).pop("tensors", None)

    def match(self, targets: Mapping[str, Target]) -> Match:
        """The layers that a model's `targets` have. InputError for a file that is for another model."""
        found = {layer: targets[layer] for layer in self.layers if layer in targets}
        fitting = {
            layer: target
            for layer, target in found.items()
            if layer not in self.faults and not self._misfit(layer, target)
        }
        theirs = lora_names.context_width(self.shapes)
        ours = lora_names.context_width({name: _matrix(target.shape) for name, target in targets.items()})
        family = lora_names.family(self.shapes)
        if not fitting or (theirs and ours and theirs != ours):
            if theirs and ours and theirs != ours:
                widths = f"its layers read text of width {theirs}, this model's of {ours}"
            elif found:
                layer = next((layer for layer in found if layer not in self.faults), next(iter(found)))
                if fault := self.faults.get(layer):
                    what = "incomplete" if fault.incomplete else "damaged"
                    raise InputError(f"{self.path} is {what}: its {layer} {fault}")
                widths = f"its {layer} {self._misfit(layer, found[layer])}"
            else:
                first = next(iter(self.layers))
                widths = f"none of its {len(self.layers)} layers is in this model (first {first})"
            kind = f" is a LoRA for {family}" if family else " is a LoRA for another model"
            raise InputError(f"{self.path}{kind}: {widths}")
        left_out = [layer for layer in self.layers if layer not in fitting]
        parts = []
        if absent := [layer for layer in left_out if layer not in found]:
            parts.append(f"{_count(absent, 'is', 'are')} not in this model (such as {absent[0]})")
        faults = {layer: self.faults[layer] for layer in left_out if layer in found and layer in self.faults}
        for what, incomplete in (("incomplete", True), ("damaged", False)):
            if faulty := [layer for layer, fault in faults.items() if fault.incomplete == incomplete]:
                why = f"such as {faulty[0]}, which {faults[faulty[0]]}"
                parts.append(f"{_count(faulty, 'is', 'are')} {what} ({why})")
        if misshapen := [layer for layer in left_out if layer in found and layer not in faults]:
            parts.append(f"{_count(misshapen, 'has', 'have')} another shape (such as {misshapen[0]})")
        if self.unknown:
            parts.append(f"{len(self.unknown)} values are of no kind known here (such as {self.unknown[0]})")
        return Match(fitting, len(self.layers), (*left_out, *self.unknown), "; ".join(parts))

    def _misfit(self, layer: str, target: Target) -> str:
        """What a layer without fault has that cannot be added to a model's weight; "" if it fits."""
        own, parts = self.shapes[layer], self._part_shapes(layer)
        if own != _matrix(target.shape):
            return f"is {_sides(own)}, this model's {_sides(target.shape)}"
        for part, sides in (("dora_scale", target.shape[:2]), ("magnitude", target.shape[:1])):
            if part in parts and math.prod(parts[part]) not in sides:
                return f"has {part} {list(parts[part])} for {_sides(target.shape)}"
        if any(part.startswith("lokr_") for part in parts):
            _, columns = lora_names.product(parts, "lokr_w2", "lokr_t2")
            if columns % math.prod(target.shape[2:]):
                return f"has a lokr_w2 of {columns} columns for {_sides(target.shape)}"
        return ""

    def change(self, layer: str) -> Change:
        """What the file adds to a layer's weight. InputError for values that are not finite.

        Other layers may have such values, as a text encoder that is at a weight of 0.
        """
        keys = self.layers[layer]
        for key in () if layer in self.finite else keys.values():
            if not _is_finite(self.tensors[key]):
                raise InputError(f"{self.path} is damaged: its {key} has values that are no finite numbers")
        self.finite.add(layer)
        parts = {part: self.tensors[key] for part, key in keys.items()}
        return Change(parts, self._peft_scale(layer))

    def _peft_scale(self, layer: str) -> float | None:
        """alpha / rank by the settings that peft and diffusers keep beside weights; None without them."""
        settings = self._peft_settings.get(layer.partition("_")[0])
        if not settings:
            return None
        rank, alpha = settings.get("r"), settings.get("lora_alpha", settings.get("alpha"))
        rank = self._own_value(layer, settings.get("rank_pattern"), rank)
        alpha = self._own_value(layer, settings.get("alpha_pattern"), alpha)
        try:
            scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else float(rank))
        except (TypeError, ValueError, ZeroDivisionError):
            return None
        except OverflowError:
            scale = math.inf
        if not math.isfinite(scale):
            raise InputError(f"{self.path}: alpha over rank of {layer} is no finite number in its settings")
        return scale

    def _own_value(self, layer: str, patterns: Any, default: Any) -> Any:
        """What the first of peft's patterns that is for a layer gives it.

        They are regular expressions of names with dots. Where a file's names have none, they are endings.
        """
        module = lora_names.dotted(next(iter(self.layers[layer].values())))
        for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
            if module:
                found = _is_for(lora_names.NETWORK.sub("", pattern).removeprefix("text_model."), module)
            else:
                found = layer.endswith(lora_names.flat(pattern).partition("_")[2])
            if found:
                return value
        return default

    @property
    def settings_digest(self) -> str:
        """A hash of the settings beside the values that decide the strength.

        "" without settings, and where they decide nothing, as each layer has an alpha of its own.
        """
        if all("alpha" in parts for parts in self.layers.values()):
            return ""
        found = {
            network: {name: own[name] for name in SCALE_SETTINGS if name in own}
            for network, own in self._peft_settings.items()
        }
        if not any(found.values()):
            return ""
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]

    @property
    def advice(self) -> str:
        """How its maker wants it to be used, in up to 100 characters (Model Metadata Standard)."""
        words = " ".join(str(self.header.metadata.get(ADVICE, "")).split())
        text = "".join(filter(str.isprintable, words))
        return text if len(text) <= 100 else f"{text[:99]}…"

    def _read_settings(self) -> dict[str, dict[str, Any]]:
        """Those of peft's adapter_config.json beside an adapter_model, or of diffusers in the file itself.

        They are those of each network, "unet" and "te"; diffusers' names are "unet.r", "text_encoder.r", …
        InputError for a file beside it that is damaged: nobody would see that the strength is another one.
        """
        beside = self.path.with_name("adapter_config.json")
        if self.path.stem == "adapter_model" and exists(beside):
            own = read_json(beside)
            return {"unet": own, "te": own}
        try:
            settings = json.loads(self.header.metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            return {}
        found = {"unet": {}, "te": {}}
        for name, value in settings.items() if isinstance(settings, dict) else ():
            network, _, setting = name.rpartition(".")
            for one in DIFFUSERS_NETWORKS.get(network, ()):
                found[one][setting] = value
        return found


# What diffusers calls the networks of a LoRA's settings; without a name they are those of both.
DIFFUSERS_NETWORKS = {"unet": ("unet",), "text_encoder": ("te",), "": ("unet", "te")}


def _is_for(pattern: str, module: str) -> bool:
    """Whether one of peft's patterns is for a layer, as in peft.utils.get_pattern_key.

    One that cannot be searched, or not in a time to wait for, is for none.
    """
    if sum(map(pattern.count, "*+{")) > REPEATS or sum(map(pattern.count, "?|")) > CHOICES:
        return False
    if re.search(r"\)[*+{]", pattern):
        return False
    try:
        return bool(re.match(rf"(.*\.)?({pattern})$", module))
    except (re.error, OverflowError, RecursionError):
        return False


class Change:
    """What is added to one weight, in factors. `parts` are as `lora_names.layers_of` names them."""

    def __init__(self, parts: Mapping[str, Tensor], peft_scale: float | None = None):
        self.parts, self.peft_scale = parts, peft_scale

    def add_to(self, total: Tensor, plain: Tensor, weight: float) -> None:
        """Add `weight` times the change to `total`, float32, by the unchanged weight `plain`."""
        matrix = total.view(total.shape[0], -1)
        plain = plain.reshape(matrix.shape)
        if not self.is_product:
            matrix.add_(self.delta(plain.float(), total.shape), alpha=weight)
            return
        up, down = self.factors(total)
        matrix.addmm_(up, down, alpha=weight * self.scale)

    @property
    def is_product(self) -> bool:
        """Whether it is one product of matrices, which needs no memory of its own."""
        return self.parts.keys() <= {"up", "down", "alpha"}

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of a product, without its scale: up [rows, rank], down [rank, columns], float32 beside `like`."""
        up, down = (self._part(name, like).flatten(1) for name in ("up", "down"))
        return up, down

    def delta(self, plain: Tensor, shape: Shape) -> Tensor:
        """What is added at a weight of 1, float32 [rows, columns], to `plain` of this shape as a matrix."""
        change = self.scale * self._undecomposed(plain, shape)
        if "magnitude" in self.parts:  # peft's, of the rows
            return _with_length(plain + change, self._part("magnitude", plain), True, 0.0) - plain
        if "dora_scale" in self.parts:  # LyCORIS': [o, 1, …], in its older versions [1, i, …]
            lengths = self._part("dora_scale", plain)
            rows = len(lengths) == len(plain) or lengths.numel() != shape[1]  # peft's has [1, o, 1, 1]
            return _with_length(plain + change, lengths, rows, EPSILON) - plain
        return change

    @property
    def scale(self) -> float:
        """alpha over the rank; 1 without an alpha."""
        if "alpha" in self.parts:
            rank = next((len(self.parts[name]) for name in RANK if name in self.parts), 0)
            return float(self.parts["alpha"]) / rank if rank else 1.0  # LyCORIS: without factors no scale
        return 1.0 if self.peft_scale is None else self.peft_scale

    def _part(self, name: str, like: Tensor) -> Tensor:
        import torch

        return self.parts[name].to(like.device, torch.float32)

    def _undecomposed(self, plain: Tensor, shape: Shape) -> Tensor:
        """The change without its scale and without DoRA's lengths, [rows, columns]."""
        import torch

        parts = {name: self._part(name, plain) for name in self.parts if name != "alpha"}
        if "diff" in parts:
            return parts["diff"].flatten(1)
        if "hada_w1_a" in parts:
            factors = []
            for i in "12":
                a, b = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]
                factors.append(
                    _tucker(parts[f"hada_t{i}"], a, b).flatten(1) if f"hada_t{i}" in parts else a @ b
                )
            return factors[0] * factors[1]
        if "up" in parts:
            up, down = parts["up"].flatten(1), parts["down"].flatten(1)
            if "mid" in parts:
                return torch.einsum("op,pqkl,qi->oikl", up, parts["mid"], down).flatten(1)
            return up @ down
        one, two = (_factor(parts, side) for side in ("lokr_w1", "lokr_w2"))
        one = one.flatten(1)
        kernel = shape[2:]
        two = two.reshape(two.shape[0], -1, *kernel)
        return torch.kron(one.reshape(*one.shape, *(1 for _ in kernel)), two.contiguous()).flatten(1)


def _factor(parts: Mapping[str, Tensor], side: str) -> Tensor:
    """One factor of a Kronecker product, whole or in factors itself."""
    if side in parts:
        return parts[side]
    a, b = parts[f"{side}_a"], parts[f"{side}_b"]
    return _tucker(parts["lokr_t2"], a, b) if side == "lokr_w2" and "lokr_t2" in parts else a @ b


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [r, s, k, l] with its first axes multiplied by a [r, o] and b [s, i]: [o, i, k, l]."""
    import torch

    return torch.einsum("pqkl,po,qi->oikl", core, a, b)


def _with_length(weight: Tensor, lengths: Tensor, rows: bool, epsilon: float) -> Tensor:
    """A weight [o, i k k] whose rows have these lengths, or else its input channels with their kernels."""
    if rows:
        return weight * (lengths.reshape(-1, 1) / (weight.norm(dim=1, keepdim=True) + epsilon))
    channels = weight.reshape(weight.shape[0], lengths.numel(), -1)
    norm = channels.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, 1) + epsilon
    return (channels * (lengths.reshape(1, -1, 1) / norm)).reshape(weight.shape)


def merge(
    plain: Tensor, changes: Sequence[tuple[Change, float, int | None]], overwrite: bool = False
) -> Tensor:
    """`plain` with changes at their weights, of its shape and type; the sum is made in float32.

    A change with a number is of the first, second or last third of the rows. With `overwrite` the memory of
    `plain` may be the result's.
    """
    import torch

    copy = not (overwrite and all(change.is_product for change, *_ in changes))  # others read `plain`
    total = plain.to(torch.float32, copy=copy, memory_format=torch.contiguous_format)
    for change, weight, third in changes:
        part, unchanged = (total, plain) if third is None else (total.chunk(3)[third], plain.chunk(3)[third])
        change.add_to(part, unchanged, weight)
    return total.to(plain.dtype)


def as_product(changes: Sequence[tuple[Change, float, int | None]]) -> tuple[Tensor, Tensor] | None:
    """The sum of changes at their weights as up [rows, r] and down [r, columns], float32, where they lie.

    None if it is no product of two matrices, or for some of the rows alone.
    """
    import torch

    if not all(change.is_product and third is None for change, _, third in changes):
        return None
    ups, downs = [], []
    for change, weight, _ in changes:
        up, down = change.factors(change.parts["up"])
        ups.append(up * (weight * change.scale))
        downs.append(down)
    return (torch.cat(ups, dim=1), torch.cat(downs)) if len(changes) > 1 else (ups[0], downs[0])


def _is_finite(values: Tensor) -> bool:
    """By the sum, which takes one reading: it is not finite if a value is not, or if the values are huge."""
    import torch

    values = values if values.dtype.itemsize > 1 else values.float()  # float8 has no sum
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _sides(shape: Shape | None) -> str:
    return "x".join(map(str, shape)) if shape else "incomplete"


def _count(layers: Sequence[str], one: str, many: str) -> str:
    return f"1 layer {one}" if len(layers) == 1 else f"{len(layers)} layers {many}"
