"""A miniature of the safety checker in the published layout, and images for it."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch.nn.functional import normalize

SIDE = 32  # of the miniature's images
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# As published: the projection has the outer width, the encoder's own setting is the default of the class.
VISION = {**ENCODER, "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8}
CONFIG = {"model_type": "clip", "projection_dim": 8, "vision_config": {**VISION, "projection_dim": 512}}
PUBLISHED_PREPROCESSING = {  # but for its sizes, which are 224
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}
SPECIAL, CONCEPT = "special_care_embeds", "concept_embeds"


def colour_blocks(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """Blocks of colour, of another mean for each seed: noise alone looks all the same to the encoder."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.integers(0, 257, (2, 3)), axis=0)
    blocks = rng.integers(low, high + 1, (-(-height // 8), -(-width // 8), 3)).clip(0, 255).astype(np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


IMAGES = [colour_blocks(seed) for seed in range(300)]


def prepared(images: list[np.ndarray], **settings: object) -> torch.Tensor:
    processor = transformers.CLIPImageProcessorPil(**{"size": SIDE, "crop_size": SIDE} | settings)
    return processor(images, return_tensors="pt").pixel_values


def embeddings(reference: StableDiffusionSafetyChecker, images: list[np.ndarray]) -> torch.Tensor:
    """[b, 8], of length 1."""
    with torch.no_grad():
        pooled = reference.vision_model(prepared(images)).pooler_output
        return normalize(reference.visual_projection(pooled))


@functools.cache
def reference_checker() -> StableDiffusionSafetyChecker:
    """diffusers' class on random weights, its thresholds such that a third of IMAGES is flagged."""
    torch.manual_seed(0)
    text = {**ENCODER, "vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1}
    model = StableDiffusionSafetyChecker(transformers.CLIPConfig.from_dict({**CONFIG, "text_config": text}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter)  # as small as CLIP's own, all images would look alike
    x = embeddings(model, IMAGES)
    for name, share in ((SPECIAL, 0.85), (CONCEPT, 0.96)):
        cosines = x @ normalize(getattr(model, name)).T
        getattr(model, f"{name}_weights").data = cosines.quantile(share, dim=0)
    return model.eval()


def write_checker(
    parent: Path, form: str = "model.safetensors", dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """The folder `safety-checker` in the published layout: its spelling of the names, with position_ids.

    `changes` are weights with other values; None leaves one out.
    """
    state = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): tensor.to(dtype)
        for name, tensor in reference_checker().state_dict().items()
    }
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state |= {name: value for name, value in changes.items() if value is not None}
    state = {name: value for name, value in state.items() if changes.get(name, 0) is not None}
    folder = parent / "safety-checker"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if form.endswith(".bin"):
        torch.save(state, folder / form)
    else:
        save_file(state, folder / form)
    return folder
