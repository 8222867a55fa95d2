"""DreamBooth: a rare word learns a subject (Ruiz et al. 2022, https://arxiv.org/abs/2208.12242).

Images of the subject's class, which the model made itself before, keep it from forgetting what else the class
is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.prompts.wildcards import Wildcards
from ldm.training.data.folder import ImageFolder
from ldm.training.data.images import fitted, tensors
from ldm.training.families import has_channels
from ldm.training.files import whole, writing
from ldm.training.finetune import lora
from ldm.training.finetune.methods import DreamBooth, Sampling, Setup
from ldm.training.processes import led
from ldm.training.tasks import Batch, LatentDiffusionTask
from ldm.weights.hashes import file_hash

CLASS_IMAGES = "class-images"  # their folder, in that of the run
_AT_A_TIME = 4  # images that are made, or encoded, together


class WithPrior(LatentDiffusionTask):
    """Adds to each example's loss `prior_weight` times that of an image of the class.

    `images` [n, 3, h, w] in [-1, 1] are of the class, and `class_prompts` [n] those that they were made by;
    without images nothing is added.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: Any,
        data: Any = None,
        *,
        images: Tensor | None = None,
        class_prompts: Sequence[str] = (),
        prior_weight: float = 1.0,
        **options: Any,
    ):
        if images is not None and has_channels(model):
            raise InputError(
                f"--class_prompt is for text-to-image models; a {type(model).__name__} needs more"
            )
        super().__init__(model, config, data, **options)
        self.images, self.class_prompts, self.prior_weight = images, class_prompts, prior_weight
        self._class_latents: tuple[Tensor, Tensor] | None = None

    def losses(self, batch: Batch) -> Tensor:
        losses = super().losses(batch)
        if self.images is None:
            return losses
        return losses + self.prior_weight * super().losses(self.class_batch(batch))

    def class_batch(self, batch: Batch) -> dict[str, Any]:
        """An image of the class for each example of a batch, with random numbers of its own."""
        mean, std = self.class_latents()
        own = {"step": -2 - batch["step"], "row": batch["row"]}  # no other batch has such a step
        index = (self.uniform(own, "class image") * len(mean)).long().to(mean.device)
        captions = [self.class_prompts[k] for k in index.tolist()]
        return own | {"mean": mean[index], "std": std[index], "caption": captions}

    @torch.no_grad()
    def class_latents(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of all images of the class, encoded once."""
        if self._class_latents is None:
            parts = [
                self.posterior({"image": images.to(self.device)}) for images in self.images.split(_AT_A_TIME)
            ]
            self._class_latents = tuple(torch.cat(each) for each in zip(*parts, strict=True))
        return self._class_latents


class DreamBoothTask(WithPrior, LatentDiffusionTask):
    """DreamBooth of the whole UNet."""


class DreamBoothLoraTask(WithPrior, lora.LoraTask):
    """DreamBooth as a LoRA."""


def class_captions(prompt: str, count: int, seed: int) -> list[str]:
    """The prompt of each image of the class: for one with choices, "a {red|blue} vase", an expansion each.

    A larger count begins with the same captions. InputError for malformed choices.
    """
    try:
        template = Wildcards().template(prompt)
    except InputError as error:
        raise InputError(f"--class_prompt: {error}") from error
    return [template.draw(Random(f"{seed} {k}")) for k in range(count)]


def make_class_images(
    open_pipeline: Callable[[], Pipeline], prompt: str, count: int, folder: Path, seed: int, fingerprint: str
) -> list[Path]:
    """Files of `count` images of a prompt by the model; those that are in the folder already are kept.

    Each has its caption beside it. `fingerprint` says which model: the images of another one, or of another
    prompt, lie in another folder. The pipeline is opened only if an image is missing.
    """
    captions = class_captions(prompt, count, seed)
    name = hashlib.sha256(f"{prompt}\n{seed}\n{fingerprint}".encode()).hexdigest()[:12]
    own = folder / CLASS_IMAGES / name
    paths = [own / f"{k:04}.png" for k in range(count)]
    missing = [k for k, path in enumerate(paths) if not path.exists()]
    if not missing:
        return paths
    with writing(own):
        own.mkdir(parents=True, exist_ok=True)
    pipeline = open_pipeline()
    made = tqdm(_generated(pipeline, captions, missing, seed), "class images", len(missing))
    for k, image in zip(missing, made, strict=True):
        with whole(paths[k].with_suffix(".txt")) as unfinished:
            unfinished.write_text(captions[k] + "\n")
        with whole(paths[k]) as unfinished:
            image.save(unfinished, "png")
    return paths


def _generated(
    pipeline: Pipeline, captions: Sequence[str], numbers: Sequence[int], seed: int
) -> Iterator[Any]:
    """The image of each number, of that number's caption and of the seed `seed` + number."""
    from PIL import Image

    for start in range(0, len(numbers), _AT_A_TIME):
        batch = numbers[start : start + _AT_A_TIME]
        requests = [ImageRequest(captions[k], seed=seed + k, steps=20, sampler="dpmpp_2m") for k in batch]
        for k, made in zip(batch, pipeline.generate(requests), strict=True):
            if made.pixels is None:
                raise InputError(f"--class_prompt {captions[k]!r}: the model's image is not finite")
            yield Image.fromarray(made.pixels)


def class_images(setup: Setup, options: DreamBooth) -> dict[str, Any]:
    """`images` of the class, [n, 3, size, size] in [-1, 1], made by the leading process; their prompts."""
    if options.class_prompt is None:
        return {}

    def open_pipeline() -> Pipeline:
        files, options = setup.files, RuntimeOptions(batch_size=_AT_A_TIME)
        return Pipeline.load(
            str(files.weights), str(files.config), options, weights=setup.weights, safety="off"
        )

    which = f"{file_hash(setup.files.weights)}\n{setup.weights}"
    paths: list[Path] = []
    with led(setup.fabric) if setup.fabric else nullcontext():
        if setup.fabric is None or setup.fabric.is_global_zero:
            paths = make_class_images(
                open_pipeline,
                options.class_prompt,
                options.class_images,
                setup.folder,
                setup.config.seed,
                which,
            )
    if setup.fabric is not None:
        paths = setup.fabric.broadcast(paths)
    source = ImageFolder(str(paths[0].parent), options.class_prompt)
    wanted = {path.name for path in paths}
    examples = [source[k] for k in range(len(source)) if source.key(k) in wanted]  # in the paths' order
    size = (setup.data.size, setup.data.size)
    images = torch.stack([tensors(fitted(example, size))["image"] for example in examples])
    return {
        "images": images,
        "class_prompts": class_captions(options.class_prompt, len(paths), setup.config.seed),
    }


def check(setup: Setup, options: DreamBooth) -> None:
    """InputError for a class prompt that is the subject's own, and for layers that the model lacks."""
    if options.class_prompt is not None:
        if options.class_prompt == setup.prompt:
            raise InputError("--class_prompt is --prompt; leave the rare word out of it")
        class_captions(options.class_prompt, 1, setup.config.seed)
    if options.lora:
        lora.check(setup, options)


def new_task(model: LatentDiffusion, setup: Setup, options: DreamBooth) -> LatentDiffusionTask:
    prior = {**class_images(setup, options), "prior_weight": options.prior_weight}
    if options.lora:
        return DreamBoothLoraTask(model, setup.config, setup.data, **prior, **lora.lora_options(options))
    model.cond_stage_trainable = options.text_encoder
    return DreamBoothTask(model, setup.config, setup.data, **prior)


def sampling(files: Sequence[Path], setup: Setup, options: DreamBooth) -> Sampling:
    return lora.sampling(files, setup, options) if options.lora else Sampling(ckpt=files[0])
