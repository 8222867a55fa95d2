"""The CLIP score: how close an image's embedding is to its prompt's, by a local CLIP model.

Hessel et al., CLIPScore, 2021 (arXiv 2104.08718), without its factor of 2.5 and its cut at 0: the mean cosine
similarity, as the model cards plot it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.errors import FieldError
from ldm.weights.files import exists, user_file
from ldm.weights.hashes import quick_hash

if TYPE_CHECKING:
    import torch

EXPECTED = (
    "give a folder in transformers' layout with config.json, model.safetensors, preprocessor_config.json and "
    "the tokenizer, such as huggingface.co/openai/clip-vit-large-patch14"
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
TEXTS = 256  # prompts that are embedded together


def check_clip(folder: str | Path) -> None:
    """FieldError, naming `clip`, if a folder holds no CLIP model; nothing large is read."""
    folder = Path(folder)

    def refused(why: str) -> FieldError:
        return FieldError("{clip} {folder} {why}: {expected}", folder=folder, why=why, expected=EXPECTED)

    if not exists(folder):
        raise refused("is not there")
    if not folder.is_dir():
        raise refused("is no folder")
    for names in (
        ("config.json",),
        WEIGHTS,
        ("preprocessor_config.json",),
        ("tokenizer.json", "vocab.json"),
    ):
        if not any(exists(folder / name) for name in names):
            raise refused(f"has no {names[0]}")
    try:
        with user_file(folder / "config.json"):
            model = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise refused("has a config.json that cannot be read") from error
    if model != "clip":
        raise refused(f"is a model of type {model!r}, not 'clip'")


def folder_hash(folder: str | Path) -> str:
    """Eight hex digits that differ where the weights of a CLIP folder do."""
    return quick_hash(next(path for name in WEIGHTS if exists(path := Path(folder, name))))


class ClipScore:
    """Cosine similarities of images and prompts under a CLIP model in transformers' folder layout.

    Nothing but the folder is read. Prompts are embedded once each.
    """

    def __init__(self, folder: str | Path, device: torch.device):
        check_clip(folder)
        import transformers
        from safetensors import SafetensorError

        # from transformers 5 on the class of this name resizes by torchvision, with other pixels
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        try:
            local = {"local_files_only": True}
            self.model = transformers.CLIPModel.from_pretrained(folder, **local).to(device).eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            self.processor = processor.from_pretrained(folder, **local)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise FieldError(
                "{clip} {folder}: {why}; {expected}", folder=folder, why=why, expected=EXPECTED
            ) from error
        self.device = device
        self._texts: dict[str, np.ndarray] = {}

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Images uint8 [h, w, 3] and a prompt for each -> cosine similarities, float64 [n]."""
        import torch

        from ldm.pipeline.device import arithmetic

        self._embed([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts])
        with torch.inference_mode(), arithmetic(self.device):
            pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            embedded = _directions(self.model.visual_projection(pooled))
        texts = np.stack([self._texts[prompt] for prompt in prompts])
        return (embedded * texts).sum(1)

    def _embed(self, prompts: Sequence[str]) -> None:
        import torch

        from ldm.pipeline.device import arithmetic

        words = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(prompts), TEXTS):
            part = list(prompts[start : start + TEXTS])
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=words, return_tensors="pt"
            ).to(self.device)
            with torch.inference_mode(), arithmetic(self.device):
                pooled = self.model.text_model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output
                embedded = _directions(self.model.text_projection(pooled))
            self._texts |= dict(zip(part, embedded, strict=True))


def _directions(embeddings: torch.Tensor) -> np.ndarray:
    """Embeddings [n, d] at length 1, float64."""
    vectors = embeddings.double().cpu().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
