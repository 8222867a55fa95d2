"""One guided step of the plain v1 UNet, beside diffusers' UNet in the same process."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from measuring import PROMPT, in_fresh_process, seconds
from report import Row
from weights_cache import v1_weights

from ldm.log import notice
from ldm.weights.loading import ROOT, V1_CONFIG


def measure_unet(options: argparse.Namespace) -> list[Row]:
    size = f"{options.latents}x{options.latents}"
    has_diffusers = find_spec("diffusers") is not None
    weights = v1_weights(options)
    readings = in_fresh_process(time_unets, ROOT / V1_CONFIG, weights, options.latents, has_diffusers, 5)
    ours = median(readings["ours"])
    what = f"a plain v1 UNet step (`--eager`), {size} latents, float32, {readings['threads']} threads"
    rows = [Row(what, "", f"{ours:.2f} s", values=readings)]
    what, target = "… against diffusers' `UNet2DConditionModel` in the same process", "no slower"
    if not has_diffusers:
        return [*rows, Row(what, target, "not measured: diffusers is not installed")]
    theirs = median(readings["diffusers"])
    difference = f"{readings['difference']:.1e} of {readings['largest output']:.1f}"
    return [
        *rows,
        Row(what, target, f"{ours / theirs:.3f} of its {theirs:.2f} s", ours <= theirs),
        Row("… largest difference of the two outputs, same weights", "", difference),
    ]


def time_unets(config: Path, weights: Path, latents: int, theirs: bool, repeats: int) -> dict[str, Any]:
    """Seconds of UNet calls at batch 2, of ours and, if asked for, diffusers' in turn, on the same weights;
    largest difference.
    """
    import torch

    from ldm.weights.loading import load_model, read_config

    section = read_config(config)
    model = load_model(section, weights)
    unet = model.model.diffusion_model
    torch.manual_seed(0)
    x, t = torch.randn(2, model.channels, latents, latents), torch.tensor([500.0, 500.0])
    with torch.inference_mode():
        context = model.get_learned_conditioning(["", PROMPT])
        calls = {"ours": lambda: unet(x, t, context)}
        if theirs:
            other = diffusers_twin(unet, section["params"])
            calls["diffusers"] = lambda: other(x, t, context).sample
        outputs = {name: call() for name, call in calls.items()}  # the warm-up
        readings = {name: [] for name in calls}
        for i in range(repeats):
            notice(f"unet: {i + 1} of {repeats}")
            for name, call in calls.items():
                readings[name].append(seconds(call))
    if theirs:
        readings["difference"] = (outputs["ours"] - outputs["diffusers"]).abs().max().item()
        readings["largest output"] = outputs["diffusers"].abs().max().item()
    return readings | {"threads": torch.get_num_threads()}


def diffusers_twin(unet: Any, params: dict) -> Any:
    """diffusers' UNet with the very tensors of ours; `params` are those of the model's YAML."""
    import torch
    from diffusers import UNet2DConditionModel

    from ldm.weights.diffusers_configs import unet_config
    from ldm.weights.diffusers_names import unet_to_theirs

    theirs = unet_to_theirs(unet.state_dict())
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet_config(params, theirs))
    twin.load_state_dict(theirs, assign=True)
    return twin.eval().requires_grad_(False)
