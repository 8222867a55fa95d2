"""LoRA files with random values for the layers of a model, in the spellings of several tools."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

KINDS = ("lora", "locon", "loha", "loha-tucker", "lokr", "lokr-full", "lokr-tucker", "diff")
RANK = 3


def factors(kind: str, shape: tuple[int, ...], seed: int = 0, alpha: float | None = 2.0) -> dict[str, Tensor]:
    """The parts of one layer's change in LyCORIS' names, for a weight of this shape."""
    generator = torch.Generator().manual_seed(seed)

    def values(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) * 0.2

    rows, columns, kernel = shape[0], shape[1], shape[2:]
    ones = (1,) * len(kernel)
    whole = columns * math.prod(kernel)
    a, b = (next(n for n in (4, 3, 2, 1) if side % n == 0) for side in (rows, columns))
    match kind:
        case "lora":
            parts = {
                "lora_down.weight": values(RANK, columns, *kernel),
                "lora_up.weight": values(rows, RANK, *ones),
            }
        case "locon":
            parts = {
                "lora_down.weight": values(RANK, columns, *ones),
                "lora_up.weight": values(rows, RANK, *ones),
            }
            if kernel:
                parts["lora_mid.weight"] = values(RANK, RANK, *kernel)
        case "loha":
            parts = {
                f"hada_w{i}_{x}": values(*((rows, RANK) if x == "a" else (RANK, whole)))
                for i in "12"
                for x in "ab"
            }
        case "loha-tucker":
            parts = {
                f"hada_w{i}_{x}": values(RANK, rows if x == "a" else columns) for i in "12" for x in "ab"
            }
            parts |= {f"hada_t{i}": values(RANK, RANK, *kernel) for i in "12"}
        case "lokr":
            parts = {"lokr_w1": values(a, b)}
            parts |= {"lokr_w2_a": values(rows // a, RANK), "lokr_w2_b": values(RANK, whole // b)}
        case "lokr-full":
            parts = {"lokr_w1": values(a, b), "lokr_w2": values(rows // a, columns // b, *kernel)}
        case "lokr-tucker":
            parts = {"lokr_w1_a": values(a, RANK), "lokr_w1_b": values(RANK, b)}
            parts |= {"lokr_w2_a": values(RANK, rows // a), "lokr_w2_b": values(RANK, columns // b)}
            parts["lokr_t2"] = values(RANK, RANK, *kernel)
        case "diff":
            parts = {"diff": values(*shape)}
    return parts if alpha is None else parts | {"alpha": torch.tensor(alpha)}


def difference(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """What the parts add to a weight, element by element as the papers write it: [o, i, k, l] or [o, i]."""
    four = (*shape, 1, 1)[:4]
    scale = float(parts["alpha"]) / RANK if "alpha" in parts else 1.0
    if "diff" in parts:
        return parts["diff"]
    if "lora_up.weight" in parts:
        up, down = (parts[f"lora_{x}.weight"] for x in ("up", "down"))
        # the layers one after the other, on each of the input's channels alone
        weight = up.reshape(up.shape[0], RANK)
        inner = (
            down.reshape(RANK, four[1], *four[2:])
            if "lora_mid.weight" not in parts
            else sum(
                parts["lora_mid.weight"][:, q, None] * down.reshape(RANK, four[1])[q, :, None, None]
                for q in range(RANK)
            )
        )
        change = sum(weight[:, p, None, None, None] * inner[p] for p in range(RANK))
    elif "hada_w1_a" in parts:
        change = 1.0
        for i in "12":
            a, b, core = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
            change = change * (_tucker(core, a, b) if core is not None else (a @ b).reshape(four))
    else:
        one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        inner = four[0] // one.shape[0], four[1] // one.shape[1], *four[2:]
        if "lokr_w2" in parts:
            two, scale = parts["lokr_w2"].reshape(inner), scale if "lokr_w1_a" in parts else 1.0
        elif "lokr_t2" in parts:
            two = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        else:
            two = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(inner)
        change = torch.cat([torch.cat([x * two for x in row], dim=1) for row in one], dim=0)
    return (scale * change).reshape(shape)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[o, i, k, l] of core [r, r, k, l], a [r, o] and b [r, i]."""
    return torch.tensordot(b.T, torch.tensordot(a.T, core, 1), ([1], [1])).transpose(0, 1)


def write(path: Path, layers: Mapping[str, tuple[int, ...]], kind: str = "lora", **facts: object) -> Path:
    """A file for layers by their names there, as "lora_unet_mid_block_attentions_0_proj_in", and shapes."""
    seed, alpha, metadata = facts.get("seed", 0), facts.get("alpha", 2.0), facts.get("metadata")
    state = {}
    for k, (layer, shape) in enumerate(layers.items()):
        for part, values in factors(kind, shape, 1000 * seed + k, alpha).items():
            state[f"{layer}.{part}"] = values.contiguous()
    save_file(state, path, metadata)
    return path


def kohya(module: nn.Module, network: str, leave_out: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a diffusers network by kohya's names; `network` is "unet" or "te"."""
    return {
        f"lora_{network}_{name.replace('.', '_')}": tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(part in name for part in leave_out)
    }


def v1_layers(width: int = 32, context: int = 32) -> dict[str, tuple[int, ...]]:
    """Some of the layers of the miniature in tiny.py by kohya's names, of each sort one."""
    block = "lora_unet_down_blocks_0_attentions_0"
    inner = f"{block}_transformer_blocks_0"
    text = "lora_te_text_model_encoder_layers_0"
    return {
        f"{block}_proj_in": (width, width, 1, 1),
        f"{inner}_attn1_to_q": (width, width),
        f"{inner}_attn2_to_k": (width, context),
        f"{inner}_attn1_to_out_0": (width, width),
        f"{inner}_ff_net_0_proj": (8 * width, width),
        f"{inner}_ff_net_2": (width, 4 * width),
        "lora_unet_down_blocks_0_resnets_0_conv1": (width, width, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj": (width, 4 * width),
        "lora_unet_down_blocks_0_downsamplers_0_conv": (width, width, 3, 3),
        "lora_unet_up_blocks_0_upsamplers_0_conv": (2 * width, 2 * width, 3, 3),
        f"{text}_self_attn_q_proj": (context, context),
        f"{text}_mlp_fc1": (4 * context, context),
    }
