"""The safety checker of the original scripts: does an image come near a concept that it should not show?

The image's CLIP embedding is compared with those of 17 concepts, each of which has a threshold, and first
with those of 3 "special care" concepts: near one of these, the other thresholds are lowered a little. What
the concepts are, and what slips through: Rando et al. 2022, https://arxiv.org/abs/2210.04610
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.errors import FieldError, InputError
from ldm.log import notice_once
from ldm.weights.files import exists
from ldm.weights.loading import SAFETY_FOLDER, find

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def safety_for(mode: str) -> str:
    """What --safety comes to here: "on", "flag", "off", or "unchecked" for "auto" without a checker.

    FieldError for a mode that needs a checker where there is none.
    """
    there = find(SAFETY_FOLDER).is_dir()
    if mode in ("on", "flag") and not there:
        raise FieldError(
            "{safety} {mode}: there is no {folder}; put the published config.json and model.safetensors "
            "there, or choose {safety} off",
            mode=mode,
            folder=SAFETY_FOLDER,
        )
    return ("on" if there else "unchecked") if mode == "auto" else mode


@dataclass(frozen=True)
class Safety:
    """The safety checker's verdicts as a pipeline takes them; without a checker nothing is checked."""

    checker: SafetyChecker | None = None
    blacken: bool = True

    @classmethod
    def load(cls, mode: str, device: torch.device) -> Safety:
        """The checks for a mode of `safety_for`; a notice, one for all models, if images go unchecked."""
        if mode == "unchecked":
            notice_once(
                f"The images are unchecked: there is no {SAFETY_FOLDER} (--safety off: no such notice)"
            )
        if mode in ("off", "unchecked"):
            return cls()
        return cls(load_safety_checker(find(SAFETY_FOLDER), device), blacken=mode == "on")

    def __call__(self, images: Sequence[np.ndarray | None]) -> list[tuple[np.ndarray | None, bool | None]]:
        """Each image, black if it was found, and whether it was; None (a NaN image) stays None."""
        there = [image for image in images if image is not None]
        if self.checker is None or not there:
            return [(image, None) for image in images]
        verdicts = iter(self.checker(there))
        checked: list[tuple[np.ndarray | None, bool | None]] = []
        for image in images:
            if image is None:
                checked.append((None, None))
                continue
            found = next(verdicts)
            checked.append((image * 0 if found and self.blacken else image, found))
        return checked


@dataclass(frozen=True)
class SafetyChecker:
    """Made by `load_safety_checker`. Images are uint8 [H, W, 3], of any sizes."""

    clip: nn.Module  # image encoder and projection, with the concepts' embeddings and thresholds as buffers
    process: Any  # transformers' CLIPImageProcessor

    def __call__(self, images: Sequence[np.ndarray]) -> list[bool]:
        """For each image: is it too near to a concept?"""
        return (self.scores(images)[1] > 0).any(dim=1).tolist() if len(images) else []

    def scores(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(special care [b, 3], concepts [b, 17]), float32 on the CPU; above 0 is too near.

        Cosine similarity - threshold, + 0.01 after the first special-care score above 0; to three digits.
        """
        import torch
        from torch.nn.functional import normalize

        clip = self.clip
        with torch.no_grad(), torch.autocast(clip.device.type, enabled=False):
            x = normalize(clip(self.preprocess(images).to(clip.device)).image_embeds)  # [b, d]
            special = x @ normalize(clip.special_care_embeds).T - clip.special_care_embeds_weights
            concept = x @ normalize(clip.concept_embeds).T - clip.concept_embeds_weights
        near = special.round(decimals=3) > 0
        special += 0.01 * (near.cumsum(dim=1) > near.int())  # those with a near one to their left
        concept += 0.01 * near.any(dim=1, keepdim=True)
        return special.round(decimals=3).cpu(), concept.round(decimals=3).cpu()

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images -> [b, 3, 224, 224]: shorter side resized to 224, bicubic; middle cut out; normalised."""
        return self.process(list(images), return_tensors="pt", input_data_format="channels_last").pixel_values


def load_safety_checker(folder: Path, device: str | torch.device = "cpu") -> SafetyChecker:
    """The checker in a folder of the published layout, in float32. Nothing is ever downloaded.

    The layout: config.json, model.safetensors or pytorch_model.bin, and perhaps preprocessor_config.json.
    Raises InputError, of one line, for a file that is missing or damaged and for any other model.
    """
    from ldm.weights.checkpoint import load_weights, read_state_dict

    names = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
    config, preprocessor, *files = (folder / name for name in names)
    weights = next((path for path in files if exists(path)), None)
    if weights is None or not exists(config):
        lacks = "config.json" if weights else " or ".join(names[2:])
        raise InputError(f"no {lacks} in {folder}: put the files of the published safety checker there")
    settings = _read_json(config), _read_json(preprocessor) if exists(preprocessor) else {}
    try:
        checker = _build(*settings)
    except Exception as error:  # a value of the wrong kind fails in whatever way the layer it reaches has
        raise InputError(f"the settings in {folder} do not make a safety checker ({error!r})") from error
    # published with a wrapper around the encoder, which transformers 5 leaves out
    wrapper, state = "vision_model.vision_model.", read_state_dict(weights)
    state = {name.replace(wrapper, "vision_model.", 1): tensor for name, tensor in state.items()}
    load_weights(checker.clip, state, path=weights)
    if not all(tensor.isfinite().all() for tensor in checker.clip.state_dict().values()):
        raise InputError(f"{weights} holds NaN or infinity, every image would pass: download it again")
    checker.clip.to(device).float().eval().requires_grad_(False)
    return checker


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} holds no settings ({error}): download it again") from error


def _build(config: dict[str, Any], preprocessing: dict[str, Any]) -> SafetyChecker:
    """The checker, its weights on the meta device."""
    import torch
    import transformers

    if config.get("model_type") != "clip":
        raise ValueError(f"model_type is {config.get('model_type')!r} instead of 'clip'")
    width = config["projection_dim"]  # the encoder's own is not set in the published file: 512 by default
    vision = transformers.CLIPVisionConfig.from_dict({**config["vision_config"], "projection_dim": width})
    with torch.device("meta"):
        clip = transformers.CLIPVisionModelWithProjection(vision)
        for name, count in (("special_care_embeds", 3), ("concept_embeds", 17)):
            clip.register_buffer(name, torch.empty(count, width))
            clip.register_buffer(f"{name}_weights", torch.empty(count))  # thresholds
    embeddings = clip.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # not in the file

    # Pillow's, as in the original: in transformers 5 the plain name is torchvision's, in 4 there is no other
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = vision.image_size
    checker = SafetyChecker(clip, kind(**{"size": side, "crop_size": side, **preprocessing}))
    shape = checker.preprocess(np.zeros((1, side, 2 * side, 3), np.uint8)).shape[1:]
    if shape != (3, side, side):
        raise ValueError(f"images are prepared as {[*shape]}, the encoder takes {[3, side, side]}")
    return checker
