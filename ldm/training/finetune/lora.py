"""Training a LoRA: small matrices beside frozen layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.files import write_tensors
from ldm.training.finetune.methods import Sampling, Setup
from ldm.training.tasks import LatentDiffusionTask
from ldm.weights.checkpoint import unused_weights
from ldm.weights.diffusers_names import rename, text_pairs, unet_levels, unet_pairs
from ldm.weights.header import read_header
from ldm.weights.lora import ADVICE
from ldm.weights.lora_names import TEXT, UNET, Target

Shape = Sequence[int]

LAYERS = {  # names of layers, as diffusers has them, by regular expression
    "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$|\.self_attn\.\w+_proj$",
    "attention+mlp": r"\.attentions\.|\.self_attn\.\w+_proj$|\.mlp\.fc[12]$",
    "all": "",
}
PARTS = "lora.parts."  # before the names of its weights in a checkpoint of the training
_SHOWN = 3  # names in an error


def layers_of_model(shapes: Mapping[str, Shape]) -> dict[str, Target]:
    """The linear and convolutional layers of a model's UNet and text encoder, by their names in diffusers.

    `shapes` are those of the weights of a checkpoint or a built model. "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", …
    """
    found: dict[str, Target] = {}
    weights = {n: tuple(s) for n, s in shapes.items() if len(s) in (2, 4) and n.endswith("weight")}
    unet = {name.removeprefix(UNET): name for name in weights if name.startswith(UNET)}
    renamed = rename(unet, unet_pairs(unet_levels(unet)))
    for theirs, ours in zip(renamed, unet, strict=True):
        if not ours.startswith("label_emb."):  # a table of vectors
            found[f"unet.{theirs.removesuffix('.weight')}"] = Target(unet[ours], weights[unet[ours]])
    text = {
        re.sub(r"^(transformer\.(text_model\.)?(?=encoder\.)|model\.)", "", name.removeprefix(TEXT)): name
        for name in weights
        if name.startswith(TEXT)
    }
    blocks = re.compile(r"transformer\.resblocks\.(\d{1,3})\.")
    last = max((int(match[1]) for name in text if (match := blocks.match(name))), default=-1)
    for theirs, ours in zip(rename(text, text_pairs(last + 1)), text, strict=True):
        shape = weights[text[ours]]
        if match := re.fullmatch(rf"{blocks.pattern}attn\.in_proj_weight", ours):
            for third, projection in enumerate("qkv"):
                name = f"text_encoder.text_model.encoder.layers.{match[1]}.self_attn.{projection}_proj"
                found[name] = Target(text[ours], (shape[0] // 3, shape[1]), third)
        elif theirs.startswith("encoder.layers."):
            found[f"text_encoder.text_model.{theirs.removesuffix('.weight')}"] = Target(text[ours], shape)
    return found


def chosen_layers(
    shapes: Mapping[str, Shape], layers: str, text_encoder: bool, unused: Collection[str] = ()
) -> dict[str, Target]:
    """Those layers that `layers`, a name of LAYERS or a regular expression, is found in.

    The text encoder's are among them only if asked for, and those of the `unused` weights, which the model
    never reads, never. InputError for an expression that is none, for one that is found in no layer, and for
    one that is found in none of the text encoder's though they are asked for.
    """
    try:
        pattern = re.compile(LAYERS.get(layers, layers))
    except re.error as error:
        raise InputError(
            f"--layers {layers!r} is neither {', '.join(LAYERS)} nor a regular expression: {error}"
        ) from error
    known = {
        name: target
        for name, target in layers_of_model(shapes).items()
        if (text_encoder or name.startswith("unet.")) and target.name not in unused
    }
    found = {name: target for name, target in known.items() if pattern.search(name)}
    if not found:
        words = dict.fromkeys([*LAYERS, *known, *(name.rpartition(".")[2] for name in known)])
        near = difflib.get_close_matches(layers, words, _SHOWN, 0.5) or [*LAYERS, *list(known)[:_SHOWN]]
        raise InputError(
            f"--layers {layers!r} matches none of the model's {len(known)} layers; the nearest names are "
            f"{', '.join(near)}"
        )
    if text_encoder and all(name.startswith("unet.") for name in found):
        own = [name for name in known if not name.startswith("unet.")]
        what = f"such as {own[0]}" if own else "which has none for a LoRA"
        raise InputError(
            f"--text_encoder: --layers {layers!r} matches no layer of the text encoder, {what}: leave "
            "--text_encoder out, or choose other layers"
        )
    return found


def check_rank(rank: int, alpha: float) -> None:
    if rank < 1:
        raise InputError(f"--rank {rank} is not at least 1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"--alpha {alpha:g} is not above 0")


class LowRank(nn.Module):
    """What is added to a layer's output for an input x: alpha / rank * up(down(x)).

    down [rank, in, k, k] begins as peft and kohya have it, uniformly distributed; up [out, rank, 1, 1] with
    zeros, so that at first nothing is added. While `on` is False nothing is, either.
    """

    on = True

    def __init__(self, shape: Shape, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, *shape[1:]))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, *(1 for _ in shape[2:])))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)

    def beside(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return self.scale * F.linear(F.linear(x, self.down), self.up)
        down = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
        return self.scale * F.conv2d(down, self.up)

    def change(self) -> Tensor:
        """The same as a change of a linear layer's weight, [out, in]."""
        return self.scale * (self.up @ self.down)


class Lora(nn.Module):
    """Low-rank changes of some layers of a model, which keep its weights and its code as they are.

    `parts` have the names of the layers in kohya's spelling, "lora_unet_…" and "lora_te_…".
    """

    def __init__(
        self, model: LatentDiffusion, layers: Mapping[str, Target], rank: int, alpha: float, seed: int = 0
    ):
        super().__init__()
        check_rank(rank, alpha)
        self.rank, self.alpha = rank, alpha
        self.names = {kohya(name): name for name in layers}
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ModuleDict()
        stacked: dict[str, dict[int, LowRank]] = {}
        for name, target in layers.items():
            part = self.parts[kohya(name)] = LowRank(target.shape, rank, alpha, generator)
            owner, _, weight = target.name.rpartition(".")
            layer = model.get_submodule(owner)
            if target.third is not None:
                stacked.setdefault(owner, {})[target.third] = part
            elif weight == "weight" and isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_hook(_beside(part))
        for owner, thirds in stacked.items():
            _change_stacked(model.get_submodule(owner), thirds)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, the model computes as it does without the changes."""
        for part in self.parts.values():
            part.on = False
        try:
            yield
        finally:
            for part in self.parts.values():
                part.on = True


def _beside(part: LowRank) -> Any:
    return lambda layer, inputs, output: output + part.beside(layer, inputs[0]) if part.on else output


def _change_stacked(attention: nn.Module, thirds: Mapping[int, LowRank]) -> None:
    """Let an attention whose query, key and value are one weight have changes of some of them.

    During its forward pass the module finds the changed weight in place of its parameter.
    """

    def change(module: nn.Module, _: Any) -> None:
        plain = module.in_proj_weight
        rows = plain.chunk(3)
        module.__dict__["in_proj_weight"] = torch.cat(
            [rows[k] + thirds[k].change() if k in thirds and thirds[k].on else rows[k] for k in range(3)]
        )

    def restore(module: nn.Module, *_: Any) -> None:
        module.__dict__.pop("in_proj_weight", None)

    attention.register_forward_pre_hook(change)
    attention.register_forward_hook(restore, always_call=True)


def kohya(name: str) -> str:
    """A layer's name of diffusers in kohya's spelling."""
    network, _, rest = name.partition(".")
    return f"lora_{'te' if network == 'text_encoder' else network}_{rest.replace('.', '_')}"


def write_lora(
    weights: Mapping[str, Tensor],
    names: Mapping[str, str],
    path: Path,
    rank: int,
    alpha: float,
    layout: str = "kohya",
    advice: str = "",
) -> Path:
    """Write a LoRA as safetensors. `weights` are "<name>.down" and "<name>.up", `names` those of diffusers.

    `advice` says how it is to be used.

    kohya's layout has `alpha` as a tensor beside each pair. diffusers' would have it in the file's metadata,
    which not all programs read: there alpha / rank is in lora_B, and alpha is the rank.
    """
    state: dict[str, Tensor] = {}
    for part, theirs in names.items():
        down, up = (weights[f"{part}.{side}"].detach().float().cpu().contiguous() for side in ("down", "up"))
        if layout == "kohya":
            state |= {f"{part}.lora_down.weight": down, f"{part}.lora_up.weight": up}
            state[f"{part}.alpha"] = torch.tensor(float(alpha))
        else:
            state |= {f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": alpha / rank * up}
    if layout == "kohya":
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": f"{alpha:g}",
        }
    else:
        settings: dict[str, Any] = {}
        for network in ("unet", "text_encoder"):
            own = [name.removeprefix(f"{network}.") for name in names.values() if name.startswith(network)]
            # transformers' CLIPTextModel has its layers with or without this, by its version
            own = [name.removeprefix("text_model.") for name in own]
            if own:
                facts = {"r": rank, "lora_alpha": rank, "target_modules": sorted(own)}
                settings |= {f"{network}.{key}": value for key, value in facts.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    write_tensors(state, path, metadata | ({ADVICE: advice} if advice else {}))
    return path


class LoraTask(LatentDiffusionTask):
    """Trains a LoRA of a model, `model.lora`; everything else stays as it is, bit for bit.

    `advice`, on how it is to be used, is written into its file.
    """

    whole = False
    advice = ""

    def __init__(
        self,
        model: LatentDiffusion,
        config: Any,
        data: Any = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        layers: str = "attention",
        text_encoder: bool = False,
        layout: str = "kohya",
    ):
        if config.strategy == "fsdp":
            raise InputError("training: strategy: a LoRA is not sharded: leave fsdp out")
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        unused = unused_weights(model)  # their gradient would be missing
        chosen = chosen_layers(shapes, layers, text_encoder, unused)
        model.lora = Lora(model, chosen, rank, rank if alpha is None else alpha, config.seed)
        self.layout, self.trains_text = layout, text_encoder
        super().__init__(model, config, data)

    def trained(self) -> dict[str, nn.Parameter]:
        return {PARTS + name: weight for name, weight in self.model.lora.parts.named_parameters()}

    def identity(self) -> dict[str, str]:
        lora = self.model.lora
        return super().identity() | {"rank": str(lora.rank), "alpha": f"{lora.alpha:g}"}

    def embed(self, captions: list[str]) -> Tensor:
        """Text embeddings [b, n, d], with gradients where the text encoder has a part of the LoRA."""
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.model.get_learned_conditioning(captions)

    def export(self, folder: Path) -> list[Path]:
        lora = self.model.lora
        path = folder / "lora.safetensors"
        state = self.exported_state()
        weights = {name.removeprefix(PARTS): t for name, t in state.items() if name.startswith(PARTS)}
        return [write_lora(weights, lora.names, path, lora.rank, lora.alpha, self.layout, self.advice)]


def check(setup: Setup, options: Any) -> None:
    """InputError for layers that the model lacks, by its file's header."""
    tensors = read_header(setup.files.weights).tensors if setup.files.weights.is_file() else {}
    shapes = {name: each.shape for name, each in tensors.items()}
    if any(name.startswith(UNET) for name in shapes):  # diffusers' names are looked at in the built model
        chosen_layers(shapes, options.layers, getattr(options, "text_encoder", False))


def lora_options(options: Any) -> dict[str, Any]:
    """Those of `LoraTask` among a method's options."""
    names = ("rank", "alpha", "layers", "text_encoder", "layout")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def new_task(model: LatentDiffusion, setup: Setup, options: Any) -> LoraTask:
    return LoraTask(model, setup.config, setup.data, **lora_options(options))


def sampling(files: Sequence[Path], setup: Setup, options: Any) -> Sampling:
    return Sampling(fields={"lora": (str(files[0]),)})
