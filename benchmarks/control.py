#!/usr/bin/env python3
"""A guided v1 step with and without a ControlNet at 512x512, by this toolkit and by diffusers, in turn.

    python benchmarks/control.py --cache outputs/benchmark-cache [--repeats 3] [--precision full|bf16]

The cache has the stand-in weights of `benchmark.py --only peers`; a ControlNet is added to it. Each of the
two runs in a process of its own, as in `peers.py`.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from peers import SIDE, TIMESTEP, Ours, contenders, guided, in_turn, noise

from ldm.weights.loading import ROOT, V1_CONFIG


class OursControlled(Ours):
    """The toolkit as `--control` sets it up."""

    def __init__(self, files: dict[str, Path], precision: str, device: str):
        from ldm.pipeline import Control, ImageRequest

        super().__init__(files, precision, device)
        self.request = ImageRequest(
            "", height=8 * SIDE, width=8 * SIDE, control=(Control(str(files["control"]), hint()),)
        )

    def features(self) -> Any:
        return self.pipeline.controls.features(self.pipeline, [self.request])[0]

    def controlled(self) -> Any:
        """The same step with the ControlNet's part in it."""
        import torch

        from ldm.pipeline.control import ControlledModel

        if not hasattr(self, "both"):
            self.step()
            net = self.pipeline.controls.net(self.pipeline, self.request.controls[0].file)
            self.both = ControlledModel(self.model, [net], [1.0], [(-np.inf, np.inf)])
            x, t, context = self.inputs[1]
            rows = {"c_crossattn": [context], "c_control": [torch.cat([self.features()] * 2)]}
            self.given = x, t, rows
        return guided(self.both.apply_model(*self.given).float())


class DiffusersControlled:
    """diffusers' UNet and ControlNet, called as its StableDiffusionControlNetPipeline does."""

    def __init__(self, files: dict[str, Path], precision: str, device: str):
        import torch
        from diffusers import ControlNetModel, UNet2DConditionModel
        from peers import PROMPT
        from transformers import CLIPTextModel

        from ldm.modules.encoders.tokenizer import CLIPTokenizer

        dtype = {"full": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}[precision]
        folder, self.device = files["diffusers"], torch.device(device)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype).to(device)
        self.net = ControlNetModel.from_pretrained(files["control"], dtype=dtype).to(device)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device)
        with torch.inference_mode():
            self.context = text(CLIPTokenizer()(["", PROMPT]).to(device))[0]
        self.x = torch.cat([noise(1, self.device).to(dtype)] * 2)
        image = torch.from_numpy(np.array(hint())).to(self.device, dtype) / 255
        self.image = torch.cat([image.permute(2, 0, 1)[None]] * 2)

    def step(self) -> Any:
        return guided(self.unet(self.x, TIMESTEP, self.context).sample.float())

    def controlled(self) -> Any:
        skips, middle = self.net(self.x, TIMESTEP, self.context, self.image, return_dict=False)
        output = self.unet(
            self.x,
            TIMESTEP,
            self.context,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        )
        return guided(output.sample.float())


def hint() -> Any:
    """A control image of 512x512 pixels."""
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 2, (SIDE, SIDE, 3), np.uint8) * 255
    return Image.fromarray(values.repeat(8, 0).repeat(8, 1))


def write_controlnet(folder: Path) -> None:
    """A v1 ControlNet of random weights in diffusers' layout, 1.4 GB; no convolution of it is zero."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel(cross_attention_dim=768)
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.01)
    net.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs/benchmark-cache")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("full", "half", "bf16"), default="full")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    files = {
        "config": ROOT / V1_CONFIG,
        "weights": options.cache / "v1-float32.safetensors",
        "diffusers": options.cache / "v1-diffusers",
        "control": options.cache / "v1-controlnet",
    }
    if not files["control"].exists():
        write_controlnet(files["control"])
    kinds = {"this": OursControlled, "diffusers": DiffusersControlled}
    makes = {name: partial(kind, files, options.precision, options.device) for name, kind in kinds.items()}
    with contenders(makes) as running:
        results = {name: each.call("controlled", wanted=True)[1] for name, each in running.items()}
        found = {method: in_turn(running, options.repeats, method) for method in ("step", "controlled")}
    for name in makes:
        plain, with_ = (median(found[method][name][1:]) for method in ("step", "controlled"))
        print(f"{name}: {plain:.2f} s a step, {with_:.2f} s with a ControlNet ({with_ / plain:.2f} times)")
    largest = np.abs(results["this"] - results["diffusers"]).max() / np.abs(results["diffusers"]).max()
    print(f"largest difference: {largest:.1e} of the largest value")


if __name__ == "__main__":
    main()
