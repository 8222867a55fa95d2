"""What an evaluation measures, and on what: prompts, models, features, reference. Imports no torch by itself.

The protocol of the model cards of Stable Diffusion v1 and v2: eight guidance scales, 50 steps of PLMS (v1) or
DDIM (v2), 10,000 captions of COCO's validation set; FID and CLIP score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import FieldError
from ldm.evaluation import captions
from ldm.evaluation.pareto import ACCURACY, CLIP_SCORE, DETECTOR_DISTANCE, FID, Axis
from ldm.log import notice
from ldm.pipeline.request import ImageRequest
from ldm.weights.description import describe, prediction_of
from ldm.weights.files import exists
from ldm.weights.loading import ModelFiles, choose_model, find, read_config

if TYPE_CHECKING:
    import torch

    from ldm.evaluation.measuring import Measures

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
STEPS = 50
IMAGES = 10_000
BUNDLED = ("models/scenes-64/model.safetensors", "models/scenes-64-v/model.safetensors")
DETECTOR = "models/scenes-64/detector.safetensors"
UNNAMED = ("model", "last", "ema")  # files whose folders say what they are


@dataclass(frozen=True)
class Model:
    """A checkpoint to measure; `name` is its folder's, and its line's in the plot."""

    name: str
    files: ModelFiles
    config: Mapping[str, Any]
    sampler: str  # as the user writes it: "DPM++ 2M Karras" is a sampler and a schedule

    @property
    def native_size(self) -> int:
        return describe(self.config).native_size


def choose_models(
    checkpoints: Sequence[str] | None, config: str | None, sampler: str | None, steps: int
) -> list[Model]:
    """The models of checkpoints, or the bundled ones, under names that differ. No weights are read.

    Without a `sampler` each has its model card's. InputError for a file that cannot be used.
    """
    paths = checkpoints or [str(find(path)) for path in BUNDLED]
    models = []
    for path in paths:
        files = choose_model(config, path)
        content = read_config(files.config)
        used = sampler or cards_sampler(files, content)
        ImageRequest(sampler=used, steps=steps)  # which refuses what cannot be
        weights = files.weights.absolute()
        name = weights.parent.name if weights.stem in UNNAMED else weights.stem
        models.append(Model(name, files, content, used))
    if len({model.name for model in models}) < len(models):
        models = [replace(model, name=_longer_name(model)) for model in models]
    if len({model.name for model in models}) < len(models):
        names = ", ".join(map(str, paths))
        raise FieldError("{ckpt} {names}: two have the same name; link them under others", names=names)
    return models


def _longer_name(model: Model) -> str:
    weights = model.files.weights.absolute()
    return f"{weights.parent.name}-{weights.stem}"


def cards_sampler(files: ModelFiles, config: Mapping[str, Any]) -> str:
    """PLMS for v1, and DDIM for v2 and what else predicts v, as in the model cards."""
    v2 = describe(config).context_dim == 1024
    return "ddim" if v2 or prediction_of(config, files.weights, files.undecided)[0] == "v" else "plms"


def common_size(models: Sequence[Model]) -> int:
    """The side in pixels that the models were made for; FieldError if they differ in it."""
    sizes = {model.native_size: model.name for model in models}
    if len(sizes) > 1:
        words = ", ".join(f"{name} {size}" for size, name in sizes.items())
        raise FieldError("the models' images differ in size ({words} pixels): give {H} and {W}", words=words)
    return next(iter(sizes))


@dataclass(frozen=True)
class Protocol:
    """All that the figures of a checkpoint at a guidance scale depend on, besides these two.

    Without `captions` the prompts are of held-out scenes. `features` are "inception" or "detector".
    `reference` is a folder of real images or an `.npz` of their statistics; of scenes it may be None, for
    renders. Without `clip` the second figure is the detector's accuracy, which takes scenes.
    """

    images: int
    height: int
    width: int
    captions: str | None = None
    seed: int = 42
    steps: int = STEPS
    sampler: str | None = None  # given by the user, for all models
    features: str = "inception"
    inception: str | None = None
    reference: str | None = None
    clip: str | None = None
    detector: str = DETECTOR
    weights: str | None = None  # "raw" or "ema"
    vae: str | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)  # approximations in use

    @cached_property
    def prompts(self) -> list[str]:
        """A different caption for each image, or scenes, which come again when there are no more."""
        if self.captions:
            return captions.choose(captions.read_captions(self.captions), self.images, self.seed)
        from ldm.evaluation.measuring import asked_scenes, scene_prompts

        return scene_prompts(asked_scenes(self.seed, self.images))

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Distance and agreement: what is measured, by its names."""
        distance = FID if self.features == "inception" else DETECTOR_DISTANCE
        return distance, CLIP_SCORE if self.clip else ACCURACY

    @property
    def has_limits(self) -> bool:
        """Whether renders of the prompts' scenes can be measured beside the models' images."""
        return not self.captions and not self.clip and self.reference is None

    def check(self) -> None:
        """InputError for prompts, networks or reference images that are missing or of another kind."""
        from ldm.evaluation import clip_score, fid

        self.prompts  # noqa: B018
        if self.features == "inception":
            if not self.inception:
                raise FieldError("{inception} is missing: {expected}", expected=fid.WHERE_INCEPTION)
            fid.check_inception(self.inception)
        if self.clip:
            clip_score.check_clip(self.clip)
        elif self.captions:
            raise FieldError("{clip} is missing: {expected}", expected=clip_score.EXPECTED)
        if self.reference and not exists(Path(self.reference)):
            raise FieldError("{reference} {path} is not there", path=self.reference)
        if not (self.reference or self.captions) and self.height != self.width:
            raise FieldError(
                "{height} {h} and {width} {w}: the renders that images are compared with are square",
                h=self.height,
                w=self.width,
            )
        if self.captions and not self.reference:
            raise FieldError(
                "{reference} is missing: give a folder of real images, such as val2017 of COCO "
                "(cocodataset.org/#download), or an .npz with their mu and sigma"
            )
        if self._needs_detector and not exists(find(self.detector)):
            raise FieldError("{detector} {path} is not there", path=self.detector)

    @property
    def _needs_detector(self) -> bool:
        return self.features == "detector" or not self.clip

    def settings(self, precision: str) -> dict[str, Any]:
        """Everything in words and numbers that JSON has; files go by their content. InputError.

        `precision` is the one that the models compute in, which depends on the device, too.
        """
        from ldm.evaluation.clip_score import folder_hash
        from ldm.weights.hashes import file_hash, quick_hash
        from ldm.weights.vae import vae_file

        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]
        return {
            "prompts": Path(self.captions).name if self.captions else "held-out scenes",
            "images": self.images,
            "seed": self.seed,
            "content of the prompts": prompts,
            "sampler": self.sampler or "the model card's",
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "features": self.features,
            "inception": quick_hash(self.inception) if self.inception else None,
            "reference": self._reference_in_words(),
            "clip": folder_hash(self.clip) if self.clip else None,
            "detector": quick_hash(find(self.detector)) if self._needs_detector else None,
            "weights": self.weights,
            "vae": self.vae and file_hash(vae_file(self.vae)),
            "precision": precision,
            **self.runtime,
        }

    def reference_digest(self) -> str:
        """A digest of all that the reference's statistics depend on."""
        from ldm.weights.hashes import quick_hash

        network = self.inception if self.features == "inception" else find(self.detector)
        facts = [self.features, quick_hash(network), self._reference_in_words(), self.height, self.width]
        if not self.reference:
            facts.append(self.seed)  # of the renders
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _reference_in_words(self) -> str:
        from ldm.evaluation.measuring import RENDERS, reference_files
        from ldm.weights.hashes import quick_hash

        if not self.reference:
            return f"{RENDERS:,} renders"
        path = Path(self.reference)
        if not path.is_dir():
            return f"{path.name} {quick_hash(path)}"
        files = reference_files(path)
        listed = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
        return f"{len(files):,} images of {path.name} {hashlib.sha256(listed.encode()).hexdigest()[:8]}"

    def request(self, model: Model, scale: float) -> ImageRequest:
        """What the images of a point have in common; a watermark would be measured, too."""
        return ImageRequest(
            sampler=model.sampler,
            steps=self.steps,
            scale=scale,
            height=self.height,
            width=self.width,
            watermark="none",
        )

    def measures(self, device: torch.device, kept: Path) -> Measures:
        """The networks on a device, and the reference's statistics.

        Those of images are in the file `kept` afterwards; what is there of the same images by the same
        network is used. A notice if there are too few images for the features.
        """
        from tqdm import tqdm

        from ldm.evaluation import clip_score, fid
        from ldm.evaluation import measuring as of

        detector = None
        if self._needs_detector:
            from ldm.scenes.detector import load_detector

            detector = load_detector(find(self.detector))
        if self.features == "inception":
            features: Any = fid.Inception(self.inception, device)
        else:
            features = fid.DetectorFeatures(detector)
        if self.images <= features.dimensions:
            notice(
                f"{self.images} images for {features.dimensions} features: the distance comes out far too "
                "large, and can be compared at this number alone"
            )
        if self.reference and Path(self.reference).is_file():
            statistics = fid.load_statistics(self.reference, features.dimensions)
        elif found := fid.kept_statistics(kept, self.reference_digest()):
            statistics = found
        else:
            if kept.exists():
                notice(f"{kept} is not known to be of this evaluation's reference: it is made anew")
            if self.reference:
                files = of.reference_files(self.reference)
                images, count = of.cropped(files, self.height, self.width), len(files)
            else:
                scenes = of.asked_scenes(self.seed, of.RENDERS)
                images, count = of.renders(scenes, self.seed + 1, self.height), of.RENDERS
            with tqdm(total=count, desc="reference", unit="image") as bar:
                statistics = of.reference_statistics(images, features, bar.update)
            fid.save_statistics(kept, statistics, self.reference_digest())
        if self.clip:
            agree = of.clip_agreement(clip_score.ClipScore(self.clip, device), self.prompts)
        else:
            agree = of.scene_agreement(detector, of.asked_scenes(self.seed, self.images))
        return of.Measures(features, fid.FrechetDistance(statistics), agree, self.seed)
