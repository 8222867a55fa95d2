"""Random networks in local files for evaluations: Inception-v3 as torch-fidelity has it, and a tiny CLIP."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers

SIDE = 32  # of the tiny CLIP's images


def write_inception(path: Path, seed: int = 0) -> Path:
    """The network that FID is defined by, on random weights that keep the size of activations."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            torch.manual_seed(seed)
            for layer in self.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(layer.weight)

    before = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: {}
    try:
        torch.save(Random("random", ["2048"]).state_dict(), path)
    finally:
        module.load_state_dict_from_url = before
    return path


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP model in transformers' layout, with CLIP's own vocabulary."""
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = transformers.CLIPConfig(
        text_config={**small, **ends, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    for name, weights in model.named_parameters():  # the usual small ones make all images and texts alike
        if weights.ndim > 1 and "logit" not in name:
            torch.nn.init.normal_(weights, std=0.3)
    model.save_pretrained(folder)
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens and merges, from the file that open_clip carries."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [n for n in range(256) if n not in printable]
    letters = [chr(n) for n in printable] + [chr(256 + k) for k in range(len(rest))]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: k for k, word in enumerate(words)}, merges


def pictures(count: int, seed: int, side: int = 48) -> list[np.ndarray]:
    """Random blocks of colour, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    return list(blocks.repeat(8, 1).repeat(8, 2))
