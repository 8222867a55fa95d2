"""Training a ControlNet beside a model that stays as it is (Zhang et al. 2023, https://arxiv.org/abs/2302.05543)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.errors import FieldError, InputError
from ldm.images.pixels import to_float
from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentUpscaleDiffusion,
    like_weights,
)
from ldm.modules.controlnet import HINT_FACTOR, ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.pipeline.control import added_features, estimator_files, load_estimator
from ldm.pipeline.settings.control import Control as ControlImage
from ldm.sampling.denoiser import Conditioning
from ldm.training.config import TrainingConfig
from ldm.training.data.example import DamagedExample, Source
from ldm.training.data.folder import ImageFolder
from ldm.training.data.sources import default_cache, open_sources
from ldm.training.files import whole, write_tensors, writing
from ldm.training.finetune import methods
from ldm.training.finetune.methods import Control, Sampling, Setup, readable_examples
from ldm.training.tasks import Batch, LatentDiffusionTask
from ldm.weights.controlnet import (
    ORIGINAL,
    check_controlnet,
    fits_diffusers,
    load_controlnet,
    write_diffusers,
)
from ldm.weights.description import describe
from ldm.weights.hashes import quick_hash
from ldm.weights.loading import ModelFiles

EDGES = "ldm.training.data.edges.Edges"
CONTROL = "control"  # the map's name, and the folder of control images in that of the images
FIRST = "input_blocks.0.0.weight"
LOOKED_AT = 64  # examples whose control images are read before training starts


def new_controlnet(unet: UNetModel, config: Mapping[str, Any]) -> ControlNet:
    """A ControlNet for the model of a `model:` section that begins as a copy of its UNet's encoder.

    Its last layers are zero, so that it changes nothing at first. Of a UNet that is given more than latents
    it copies the weights for these.
    """
    params = config.get("params") or {}
    net = ControlNet(params.get("channels", 4), **(params["unet_config"].get("params") or {}))
    own, theirs = net.state_dict(), unet.state_dict()
    copied = {name: theirs[name] for name in own if name in theirs}
    copied[FIRST] = copied[FIRST][:, : own[FIRST].shape[1]]
    net.load_state_dict(copied, strict=False)
    return net


def read_controlnet(path: str | Path, config: Mapping[str, Any]) -> ControlNet:
    """The ControlNet of a file or a diffusers folder, to go on from. InputError for one of another model."""
    check_controlnet(path, config)
    return load_controlnet(path, config, torch.float32)


class ControlNetTask(LatentDiffusionTask):
    """Trains a ControlNet, `model.control_model`; everything else stays as it is, bit for bit.

    `section` is the `model:` section of the model. Batches have `control`, float32 [b, 3, 8 h, 8 w] in 0 … 1
    for latents [h, w].
    """

    whole = False

    def __init__(
        self,
        model: LatentDiffusion,
        config: TrainingConfig,
        data: Any = None,
        *,
        net: ControlNet,
        section: Mapping[str, Any],
    ):
        if isinstance(model, LatentUpscaleDiffusion):
            raise InputError("there are no ControlNets for models that enlarge images")
        if config.compile:
            raise InputError(
                "training: compile: a UNet that a ControlNet adds to runs uncompiled; leave it out"
            )
        model.control_model = net
        super().__init__(model, config, data)
        net.use_checkpoint = config.checkpointing
        model.apply_model = self.apply_model
        self.section = section

    def trained(self) -> dict[str, nn.Parameter]:
        return {ORIGINAL + name: weight for name, weight in self.model.control_model.named_parameters()}

    def conditioning(self, batch: Batch, context: Tensor) -> Conditioning:
        """As for the model alone, with features of the control images, which repeat where texts are more."""
        cond = super().conditioning(batch, context)
        hints = batch["control"][torch.arange(len(context)) % len(batch["control"])]
        plain = cond if isinstance(cond, Mapping) else {"c_crossattn": [cond]}
        return {**plain, "c_control": [self.model.control_model.embed(hints)]}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning, return_ids: bool = False) -> Tensor:
        """The model's own, with what the ControlNet adds to the UNet's features."""
        model, rest = self.model, {name: value for name, value in cond.items() if name != "c_control"}
        context = torch.cat(list(rest["c_crossattn"]), dim=1)
        added = model.control_model(
            *like_weights([x_noisy, t, context, cond["c_control"][0]], model.control_model)
        )
        with added_features(self.unet, added):
            return type(model).apply_model(model, x_noisy, t, rest)

    def export(self, folder: Path) -> list[Path]:
        """The ControlNet in the original's layout, in half precision, and as a folder of diffusers.

        diffusers does not have the miniature's architecture: of that there is no folder.
        """
        state = {
            name.removeprefix(ORIGINAL): t.detach().half().cpu()
            for name, t in self.exported_state().items()
            if name.startswith(ORIGINAL)
        }
        single, theirs = folder / "controlnet.safetensors", folder / "controlnet-diffusers"
        write_tensors({ORIGINAL + name: t for name, t in state.items()}, single)
        if not fits_diffusers(state):
            return [single]
        write_diffusers(state, self.section, theirs)
        return [single, theirs]


def train_source(
    folder: str, prompt: str | None, size: int, options: Control, files: ModelFiles
) -> dict[str, Any]:
    """The `train:` part of a `data:` section: images of a folder, their captions, and control images.

    These are in the folder `control/` in it under the names of the images, or made by `options.preprocess`:
    edges at `size` pixels, or depths, which `new_task` estimates once with the estimator for the model of
    these files. InputError without control images.
    """
    plain = methods.train_source(folder, prompt or "")
    if options.preprocess == "canny":
        return {"target": EDGES, "params": {"source": plain, "size": size}}
    own = Path(folder, CONTROL)
    if options.preprocess == "depth":
        images, (_, estimator) = ImageFolder(**plain["params"]).fingerprint, estimator_of(files)
        own = default_cache() / "depths" / f"{images[:16]}-{quick_hash(estimator)}"
        own.mkdir(parents=True, exist_ok=True)
    elif not own.is_dir():
        raise InputError(
            f"{folder} has no control images: put them into {own} under the names of the images, or let "
            "--preprocess canny or depth make them"
        )
    plain["params"]["maps"] = {CONTROL: str(own)}
    return plain


def check(setup: Setup, options: Control) -> None:
    """InputError for a model that no ControlNet is for, an unfit file, and unfit control images."""
    described = describe(setup.section)
    if described.task == "upscale":
        raise InputError("there are no ControlNets for models that enlarge images")
    if (described.factor or HINT_FACTOR) != HINT_FACTOR:
        raise InputError(
            f"a ControlNet makes features at 1/{HINT_FACTOR} of the control image's size, and the model's "
            f"latents are at 1/{described.factor}"
        )
    if options.control_init:
        check_controlnet(options.control_init, setup.section)
    if options.preprocess and not made_by(setup.data.train, options.preprocess):
        raise InputError(
            f"--preprocess {options.preprocess} makes control images of --data FOLDER: the YAML file's "
            "data.train has its own, so leave one of them out"
        )
    if options.preprocess != "depth":
        check_controls(open_sources(setup.data, cache=setup.folder)[0])


def new_task(model: LatentDiffusion, setup: Setup, options: Control) -> ControlNetTask:
    if options.control_init:
        net = read_controlnet(options.control_init, setup.section)
    else:
        net = new_controlnet(model.model.diffusion_model, setup.section)
    if options.preprocess == "depth":
        params = setup.data.train["params"]
        images, folder = ImageFolder(**_without(params)), Path(params["maps"][CONTROL])
        device = setup.fabric.device if setup.fabric else torch.device("cpu")
        write_depths(images, load_estimator(*estimator_of(setup.files)), folder, device)
    return ControlNetTask(model, setup.config, setup.data, net=net, section=setup.section)


def sampling(files: Sequence[Path], setup: Setup, options: Control) -> Sampling:
    """The control image is that of the first example, and so is the prompt."""
    example = next(readable_examples(setup))
    hint = Image.fromarray(example.maps[CONTROL])
    caption = setup.prompt or example.caption
    return Sampling(fields={"control": (ControlImage(str(files[0]), hint),)}, prompts=(caption,))


def made_by(train: Mapping[str, Any], preprocess: str) -> bool:
    """Whether a `data.train` is one for which `train_source` makes the control images."""
    if preprocess == "canny":
        return train["target"] == EDGES
    return str(default_cache() / "depths") in str((train.get("params") or {}).get("maps"))


def estimator_of(files: ModelFiles) -> tuple[Mapping[str, Any], Path]:
    """The config and the file of the depth estimator for a model. InputError if there is none."""
    try:
        return estimator_files(SimpleNamespace(files=files))
    except FieldError as error:
        raise InputError(
            "--preprocess depth takes the estimator of a Stable Diffusion v2 depth checkpoint, linked at "
            f"models/ldm/stable-diffusion-v2-depth/model.ckpt; or put depth maps into FOLDER/{CONTROL}"
        ) from error


def _without(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a folder's images without their maps."""
    return {name: value for name, value in params.items() if name != "maps"}


def check_controls(source: Source) -> None:
    """InputError unless the control images of the first examples are there, and as large as their images."""
    for index in range(min(len(source), LOOKED_AT)):
        try:
            example = source[index]
        except DamagedExample:  # the loader skips and counts these
            continue
        control = example.maps.get("control")
        if control is None:
            raise InputError(
                f"{example.key} has no control image: give a source that has them, or --preprocess canny"
            )
        sizes = [f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (control, example.image)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the control image of {example.key} has {sizes[0]} pixels and the image {sizes[1]}: they "
                "have to be of one size"
            )


@torch.no_grad()
def write_depths(source: ImageFolder, estimator: nn.Module, folder: Path, device: torch.device) -> None:
    """Write the estimated depth of each image to `folder`, near is white, unless it is there already."""
    estimator = estimator.to(device)
    for index in tqdm(range(len(source)), "estimating depths"):
        path = (folder / source.key(index)).with_suffix(".png")
        if path.exists():
            continue
        try:
            image = to_float([source[index].image]).to(device)
        except DamagedExample:  # the loader skips and counts it, but its map has to be there
            image = torch.zeros(1, 3, 64, 64, device=device)
        depth = (
            LatentDepth2ImageDiffusion.estimate_depth(SimpleNamespace(depth_model=estimator), image)[0, 0]
            .float()
            .cpu()
            .numpy()
        )
        grey = (depth - depth.min()) * (255 / max(np.ptp(depth), 1e-9))
        with writing(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            Image.fromarray(grey.round().astype(np.uint8)).convert("RGB").save(unfinished, "png")
