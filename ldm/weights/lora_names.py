"""The names in LoRA files: which weight of a model each of them is for. Does without torch.

A file has some small tensors for each layer that it changes. Trainers name the layers as diffusers does, with
dots or with underscores, under many prefixes, or as the original checkpoints do; all of these become one form
here, with underscores. What the small tensors are called is the same in most tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from ldm.weights.diffusers_names import rename, text_pairs, unet_levels, unet_pairs

Shape = Sequence[int]
UNET, TEXT = "model.diffusion_model.", "cond_stage_model."

KEY = re.compile(
    r"(?P<module>.+?)\.(?:processor\.)?(?:"
    # kohya's lora_down; diffusers' lora.down, lora_linear_layer.down, to_q_lora.down; peft's lora_A[.name]
    r"(?:to_(?P<projection>q|k|v|out)_)?lora(?:_linear_layer)?[._](?P<lora>down|up|mid|A|B)(?:\.\w+)?\.weight"
    # kohya's and LyCORIS'
    r"|(?P<part>alpha|dora_scale|diff|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.weight)?"
    # peft's DoRA
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*"
    r")"
)
NETWORK = re.compile(r"^(unet\.|text_encoder\.)?(base_model\.model\.)?")  # before a layer's name with dots
PEFT = {"A": "down", "B": "up"}
SPELLED = {part: f"lora_{part}" for part in ("down", "up", "mid")}  # in messages, as kohya has them
# beginnings of layers' names with underscores, longest first, and the network that they are of
PREFIXES = {
    "text_encoders_clip_l_transformer_": "te",  # ComfyUI's, of Stable Diffusion v1
    "text_encoders_clip_h_transformer_": "te",  # of v2
    "text_encoders_clip_g_transformer_": "te2",
    "model_diffusion_model_": "unet",
    "text_encoder_3_": "te3",
    "text_encoder_2_": "te2",
    "diffusion_model_": "unet",
    "text_encoder_": "te",
    "transformer_": "transformer",
    "unet_": "unet",
    "te3_": "te3",
    "te2_": "te2",
    "te1_": "te",
    "te_": "te",
}
# other families by the names of their networks and layers
OTHERS = (
    (r"\w+?_(double_blocks|single_blocks|single_transformer_blocks)_", "FLUX"),
    (r"\w+?_joint_blocks_|transformer_transformer_blocks_\d+_attn_add_", "Stable Diffusion 3"),
    (r"te2_", "Stable Diffusion XL"),
    (r"unet_\w*transformer_blocks_[2-9]_", "Stable Diffusion XL"),
)
WIDTHS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2", 2048: "Stable Diffusion XL"}


class Target(NamedTuple):
    """A weight of a model, or a third of its rows: the query, key or value of OpenCLIP, from 0."""

    name: str
    shape: tuple[int, ...]
    third: int | None = None


class PartsError(ValueError):
    """Parts of a layer that make up no change of its weight; the message says what it has, or has not."""

    def __init__(self, why: str, incomplete: bool = False):
        super().__init__(why)
        self.incomplete = incomplete


def flat(module: str) -> str:
    """A layer's name with its network's before it, if that is known, and underscores."""
    name = module.replace("base_model.model.", "").replace(".", "_")
    name = name.removeprefix("lycoris_").removeprefix("lora_")
    for prefix, network in PREFIXES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return f"{network}_{rest.removeprefix('text_model_') if network == 'te' else rest}"
    if re.match(r"text_model_|encoder_layers_", name):
        return f"te_{name.removeprefix('text_model_')}"
    return f"unet_{name}"


def dotted(key: str) -> str:
    """The name of a key's layer in its network, with dots, as peft knows it; "" if the key has none."""
    match = KEY.fullmatch(key)
    if not match or match["projection"] or "." not in match["module"]:
        return ""
    return NETWORK.sub("", match["module"])


def layers_of(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of a file by layer and part, and those that are of no kind known here.

    Parts are down, up, mid (LoRA, LoCon), hada_… (LoHa), lokr_… (LoKr), diff (a whole difference), alpha,
    dora_scale and magnitude (DoRA). PartsError for two keys of one part, as of peft's adapters side by side.
    """
    layers: dict[str, dict[str, str]] = {}
    unknown = []
    for name in names:
        match = KEY.fullmatch(name)
        if not match:
            unknown.append(name)
            continue
        module = match["module"]
        if projection := match["projection"]:
            if module.endswith("self_attn"):  # a text encoder's
                module += f".{projection}_proj"
            else:
                module += ".to_out.0" if projection == "out" else f".to_{projection}"
        lora = match["lora"]
        part = PEFT.get(lora, lora) or match["part"] or "magnitude"
        parts = layers.setdefault(flat(module), {})
        if part in parts:
            both = f"{parts[part]!r} and {name!r}"
            raise PartsError(f"holds several LoRAs in one, as its {both} are: save each in a file of its own")
        parts[part] = name
    return layers, unknown


def targets(shapes: Mapping[str, Shape]) -> dict[str, Target]:
    """The weights of a model by the names that `flat` gives to their layers.

    `shapes` are those of a checkpoint's or a built model's weights.
    """
    found: dict[str, Target] = {}
    matrices = {name: tuple(shape) for name, shape in shapes.items() if len(shape) in (2, 4)}
    unet = {name.removeprefix(UNET): name for name in matrices if name.startswith(UNET)}
    for ours, theirs in zip(unet, rename(unet, unet_pairs(unet_levels(unet))), strict=True):
        for spelling in (ours, theirs):
            found[flat(f"unet.{spelling.removesuffix('.weight')}")] = Target(unet[ours], matrices[unet[ours]])
    text = {
        re.sub(r"^(transformer\.(text_model\.)?(?=encoder\.)|model\.)", "", name.removeprefix(TEXT)): name
        for name in matrices
        if name.startswith(TEXT)
    }
    blocks = re.compile(r"transformer\.resblocks\.(\d{1,3})\.")
    last = max((int(match[1]) for name in text if (match := blocks.match(name))), default=-1)
    for ours, theirs in zip(text, rename(text, text_pairs(last + 1)), strict=True):
        name, shape = text[ours], matrices[text[ours]]
        if match := re.fullmatch(rf"{blocks.pattern}attn\.in_proj_weight", ours):
            for third, projection in enumerate("qkv"):
                part = Target(name, (shape[0] // 3, shape[1]), third)
                found[f"te_encoder_layers_{match[1]}_self_attn_{projection}_proj"] = part
        else:
            found[flat(f"te.{theirs.removesuffix('.weight')}")] = Target(name, shape)
    return found


def change_shape(parts: Mapping[str, Shape]) -> tuple[int, int]:
    """Rows and columns of what a layer's parts add to its weight, seen as a matrix.

    PartsError for parts of which one lacks, or that do not fit each other.
    """
    if prod(parts.get("alpha", ())) != 1:
        raise PartsError(f"has alpha {list(parts['alpha'])}, which is not one number")
    if "diff" in parts:
        return _whole(parts, "diff")
    if any(part.startswith("hada_") for part in parts):
        one, two = product(parts, "hada_w1", "hada_t1"), product(parts, "hada_w2", "hada_t2")
        if one != two:
            sides = " and ".join(f"{rows}x{columns}" for rows, columns in (one, two))
            raise PartsError(f"has products of its hada factors of {sides}, which are not of one shape")
        return one
    if any(part.startswith("lokr_") for part in parts):
        one, two = product(parts, "lokr_w1"), product(parts, "lokr_w2", "lokr_t2")
        return one[0] * two[0], one[1] * two[1]
    _need(parts, "up", "down")
    (rows, rank), (_, columns) = _whole(parts, "up"), _whole(parts, "down")
    if "mid" not in parts:
        _agree(parts, "up", rank, "down", parts["down"][0])
        return rows, columns
    _axes(parts, "mid", 4)
    _agree(parts, "up", rank, "mid", parts["mid"][0])
    _agree(parts, "down", parts["down"][0], "mid", parts["mid"][1])
    return rows, columns * prod(parts["mid"][2:])


def product(parts: Mapping[str, Shape], name: str, core: str = "") -> tuple[int, int]:
    """Rows and columns of a LoHa's or LoKr's matrix `name`: whole, a @ b, or a core between a and b.

    PartsError as of `change_shape`.
    """
    if name in parts:
        return _whole(parts, name)
    names = f"{name}_a", f"{name}_b"
    _need(parts, *names)
    for factor in names:
        _axes(parts, factor, 2)
    a, b = (parts[factor] for factor in names)
    if core not in parts:
        _agree(parts, names[0], a[1], names[1], b[0])
        return a[0], b[1]
    _axes(parts, core, 4)
    for factor, rank in zip(names, parts[core], strict=False):
        _agree(parts, factor, parts[factor][0], core, rank)
    return a[1], b[1] * prod(parts[core][2:])


def _whole(parts: Mapping[str, Shape], name: str) -> tuple[int, int]:
    """Rows and columns of a part as a matrix, whose kernel, if it has one, belongs to the columns."""
    if len(parts[name]) < 2:
        raise PartsError(f"has {_shown(parts, name)}, which is no matrix")
    return parts[name][0], prod(parts[name][1:])


def _need(parts: Mapping[str, Shape], *names: str) -> None:
    if lacking := [SPELLED.get(name, name) for name in names if name not in parts]:
        raise PartsError(f"has no {' and no '.join(lacking)}", incomplete=True)


def _axes(parts: Mapping[str, Shape], name: str, count: int) -> None:
    if len(parts[name]) != count:
        raise PartsError(f"has {_shown(parts, name)}, which is to have {count} axes")


def _agree(parts: Mapping[str, Shape], one: str, rank: int, two: str, other: int) -> None:
    if rank != other:
        both = f"{_shown(parts, one)} and {_shown(parts, two)}"
        raise PartsError(f"has {both}, whose ranks {rank} and {other} differ")


def _shown(parts: Mapping[str, Shape], name: str) -> str:
    return f"{SPELLED.get(name, name)} {list(parts[name])}"


def context_width(layers: Mapping[str, tuple[int, int] | None]) -> int | None:
    """What a token has of numbers where the layers of a UNet read it; None if no such layer is there."""
    widths = (shape[1] for name, shape in layers.items() if re.search(r"attn2_to_[kv]$", name) and shape)
    return next(widths, None)


def family(layers: Mapping[str, tuple[int, int] | None]) -> str:
    """The kind of model that layers are of, as far as their names and shapes say; "" if they do not."""
    for pattern, name in OTHERS:
        if any(re.match(pattern, layer) for layer in layers):
            return name
    return WIDTHS.get(context_width(layers), "")
