"""The names of weights in diffusers folders and in single files: one mapping, used in both directions.

Both libraries build the same networks of the same layers, so a mapping is a list of pairs of module names,
made by counting levels and blocks. Three things differ by more than names, and are undone by shape: attention
in the autoencoder is a 1x1 convolution here and a linear layer there; OpenCLIP and MiDaS keep query, key and
value of an attention in one matrix; transformers' CLIP has had a `text_model.` before its names and lost it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Pairs = dict[str, str]  # names of modules or weights here -> there


@dataclass(frozen=True)
class Outline:
    """A tensor without its values, as the headers of files give it. It does without torch."""

    dtype: str  # torch's name of it
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def reshape(self, shape: tuple[int, ...]) -> Outline:
        return Outline(self.dtype, tuple(shape))


State = dict[str, "Tensor | Outline"]

RESNET = {  # of the UNet; those of the autoencoder differ in one name
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"} | {
    "nin_shortcut": "conv_shortcut"
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# the weights that are not what an autoencoder's training left: its loss, its averages
AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# the weights of the last four of VAE_ATTENTION
ATTENTION = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$")
# what diffusers called these until its version 0.15
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Level:
    """One resolution of a network, counted in its encoding half."""

    blocks: int  # residual blocks; the decoding half has one more
    attention: bool


def _numbers(names: Iterable[str], pattern: str) -> set[tuple[int, ...]]:
    """The numbers that stand at each # of a pattern, in the names that begin with it."""
    regex = re.compile(re.escape(pattern).replace(r"\#", r"(\d{1,3})"))  # no network has a thousand layers
    return {tuple(map(int, match.groups())) for name in names if (match := regex.match(name))}


def _levels(names: Iterable[str], block: str, attention: str) -> list[Level]:
    """Levels by the patterns of a level's blocks and of its attention."""
    names = list(names)
    blocks = _numbers(names, block)
    with_attention = {level for level, *_ in _numbers(names, attention)}
    count = 1 + max((level for level, _ in blocks), default=-1)
    return [Level(sum(level == i for level, _ in blocks), i in with_attention) for i in range(count)]


def unet_levels(names: Iterable[str]) -> list[Level]:
    """The levels of a UNet by its names, in either spelling.

    Here blocks are numbered through all levels: a level ends with its downsampling block.
    """
    names = list(names)
    if any(name.startswith("down_blocks.") for name in names):
        return _levels(names, "down_blocks.#.resnets.#.", "down_blocks.#.attentions.")
    ends = sorted(block for (block,) in _numbers(names, "input_blocks.#.0.op."))
    last = max((block for (block,) in _numbers(names, "input_blocks.#.")), default=0)
    attention = {block for (block,) in _numbers(names, "input_blocks.#.1.")}
    starts = [0, *ends]  # the block before each level: the first convolution or a downsampling
    return [
        Level(end - start - 1, not attention.isdisjoint(range(start, end)))
        for start, end in zip(starts, [*ends, last + 1], strict=True)
    ]


def unet_pairs(levels: list[Level]) -> Pairs:
    """Pairs of a UNet. Transformer blocks have the same names in both."""
    pairs = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def add(ours: str, theirs: str) -> None:
        pairs.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()})

    block, last = 1, len(levels) - 1
    for i, level in enumerate(levels):
        for j in range(level.blocks):
            add(f"input_blocks.{block}.0", f"down_blocks.{i}.resnets.{j}")
            pairs[f"input_blocks.{block}.1"] = f"down_blocks.{i}.attentions.{j}"
            block += 1
        if i != last:
            pairs[f"input_blocks.{block}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            block += 1
    add("middle_block.0", "mid_block.resnets.0")
    pairs["middle_block.1"] = "mid_block.attentions.0"
    add("middle_block.2", "mid_block.resnets.1")
    block = 0
    for i, level in enumerate(reversed(levels)):
        for j in range(level.blocks + 1):
            add(f"output_blocks.{block}.0", f"up_blocks.{i}.resnets.{j}")
            if level.attention:
                pairs[f"output_blocks.{block}.1"] = f"up_blocks.{i}.attentions.{j}"
            block += 1
        if i != last:
            layer = 2 if level.attention else 1  # the upsampling is the last layer of the level's last block
            pairs[f"output_blocks.{block - 1}.{layer}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return pairs


def vae_levels(names: Iterable[str]) -> list[Level]:
    """The levels of an autoencoder by its names, in either spelling."""
    names = list(names)
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return _levels(names, "encoder.down_blocks.#.resnets.#.", "encoder.down_blocks.#.attentions.")
    return _levels(names, "encoder.down.#.block.#.", "encoder.down.#.attn.")


def vae_pairs(levels: list[Level]) -> Pairs:
    """Pairs of an autoencoder. Here `decoder.up.0` is the full resolution, there the lowest."""
    pairs: Pairs = {}

    def add(ours: str, theirs: str, inner: Mapping[str, str]) -> None:
        pairs.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()})

    last = len(levels) - 1
    for half in ("encoder", "decoder"):
        add(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", VAE_RESNET)
        add(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        add(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", VAE_RESNET)
        pairs[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    for i, level in enumerate(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{last - i}"
        for j in range(level.blocks):
            add(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}", VAE_RESNET)
            add(f"encoder.down.{i}.attn.{j}", f"{down}.attentions.{j}", VAE_ATTENTION)
        for j in range(level.blocks + 1):
            add(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}", VAE_RESNET)
            add(f"decoder.up.{i}.attn.{j}", f"{up}.attentions.{j}", VAE_ATTENTION)
        pairs[f"encoder.down.{i}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        pairs[f"decoder.up.{i}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return pairs


def text_pairs(layers: int) -> Pairs:
    """Pairs of OpenCLIP's text transformer and transformers' CLIPTextModel, each without its prefix."""
    pairs = {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
    }
    for i in range(layers):
        ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        pairs |= {
            f"{ours}.ln_1": f"{theirs}.layer_norm1",
            f"{ours}.ln_2": f"{theirs}.layer_norm2",
            f"{ours}.attn.out_proj": f"{theirs}.self_attn.out_proj",
            f"{ours}.mlp.c_fc": f"{theirs}.mlp.fc1",
            f"{ours}.mlp.c_proj": f"{theirs}.mlp.fc2",
        }
    return pairs


def stack(parts: list[Tensor] | list[Outline]) -> Tensor | Outline:
    """Tensors one below the other, along their first axis."""
    if isinstance(parts[0], Outline):
        return Outline(parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
    import torch

    return torch.cat(parts)


@dataclass(frozen=True)
class Fused:
    """Query, key and value, stacked along the first axis of one weight or bias here."""

    ours: str  # a regular expression whose groups are the layer and "weight" or "bias"
    ours_name: str  # a format string of both
    theirs: tuple[str, str, str]  # of query, key and value

    def fuse(self, state: State) -> State:
        """`state`, in their names, with each layer's three tensors as one in ours."""
        fused = dict(state)
        query = re.escape(self.theirs[0])
        query = query.replace(r"\{layer\}", r"(\d{1,3})").replace(r"\{what\}", "(weight|bias)")
        for name in state:
            if match := re.fullmatch(query, name):
                facts = {"layer": match[1], "what": match[2]}
                theirs = [part.format(**facts) for part in self.theirs]
                if all(part in fused for part in theirs):  # otherwise what is missing is found later
                    fused[self.ours_name.format(**facts)] = stack([fused.pop(part) for part in theirs])
        return fused

    def split(self, state: State) -> State:
        """`state`, in our names, with each layer's stacked tensor as three in theirs."""
        parted = dict(state)
        for name in state:
            if match := re.fullmatch(self.ours, name):
                parts = parted.pop(name).chunk(3)
                names = (part.format(layer=match[1], what=match[2]) for part in self.theirs)
                parted.update(zip(names, parts, strict=True))
        return parted


OPEN_CLIP_QKV = Fused(
    r"transformer\.resblocks\.(\d{1,3})\.attn\.in_proj_(weight|bias)",
    "transformer.resblocks.{layer}.attn.in_proj_{what}",
    tuple(f"encoder.layers.{{layer}}.self_attn.{x}_proj.{{what}}" for x in "qkv"),
)
MIDAS_QKV = Fused(
    r"pretrained\.model\.blocks\.(\d{1,3})\.attn\.qkv\.(weight|bias)",
    "pretrained.model.blocks.{layer}.attn.qkv.{what}",
    tuple(f"dpt.encoder.layer.{{layer}}.attention.attention.{x}.{{what}}" for x in ("query", "key", "value")),
)


def rename(state: Mapping[str, Tensor], pairs: Mapping[str, str]) -> State:
    """`state` with the longest beginning of each name that is in `pairs`, cut at a dot, replaced."""
    renamed = {}
    for name, tensor in state.items():
        head, tail = name, ""
        while head and head not in pairs:
            head, dot, last = head.rpartition(".")
            tail = dot + last + tail
        renamed[pairs[head] + tail if head else name] = tensor
    return renamed


def inverted(pairs: Pairs) -> Pairs:
    return {theirs: ours for ours, theirs in pairs.items()}


def _count(names: Iterable[str], pattern: str) -> int:
    """1 + the largest number at the # of a pattern; 0 without any."""
    return 1 + max((number for (number,) in _numbers(names, pattern)), default=-1)


# Each of a model's parts, without its prefix: state dict in their names -> in ours, and back.


def unet_to_ours(state: State) -> State:
    return rename(state, inverted(unet_pairs(unet_levels(state))))


def unet_to_theirs(state: State) -> State:
    return rename(state, unet_pairs(unet_levels(state)))


def vae_to_ours(state: State) -> State:
    """An autoencoder whose attention may have the old names and shapes, or the new."""
    old = r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)"
    modern = {re.sub(old, lambda m: m[1] + OLD_ATTENTION[m[2]], name): t for name, t in state.items()}
    return _attention_as(4, rename(modern, inverted(vae_pairs(vae_levels(modern)))))


def vae_to_theirs(state: State) -> State:
    return rename(_attention_as(2, state), vae_pairs(vae_levels(state)))


def _attention_as(dimensions: int, state: State) -> State:
    """Weights in our names with the projections of attention as 1x1 convolutions (4 axes) or matrices (2)."""
    return {
        name: t.reshape((*t.shape[:2], 1, 1)[:dimensions]) if ATTENTION.search(name) else t
        for name, t in state.items()
    }


def open_clip_to_ours(state: State) -> State:
    """transformers' CLIPTextModel, `text_model.` removed, in OpenCLIP's names."""
    layers = _count(state, "encoder.layers.#.")
    return rename(OPEN_CLIP_QKV.fuse(state), inverted(text_pairs(layers)))


def open_clip_to_theirs(state: State) -> State:
    layers = _count(state, "transformer.resblocks.#.")
    return rename(OPEN_CLIP_QKV.split(state), text_pairs(layers))


def midas_to_ours(state: State) -> State:
    """transformers' DPTForDepthEstimation in the names of MiDaS."""
    from ldm.modules.midas.names import checkpoint_name

    return {checkpoint_name(name): t for name, t in MIDAS_QKV.fuse(state).items()}


def midas_to_theirs(state: State, twins: Mapping[str, Sequence[str]]) -> State:
    """The reverse; `twins` are the names that one of ours has there, three for query, key and value."""
    theirs = {}
    for name, tensor in state.items():
        names = twins.get(name, ())
        theirs |= dict(zip(names, tensor.chunk(max(1, len(names))), strict=False))
    return theirs
