"""Package of the toolkit; pinned versions stand in constraints.txt."""

from setuptools import find_packages, setup

TRAINING = ["codecarbon", "matplotlib", "pyarrow", "tensorboard", "webdataset"]
EVALUATION = ["matplotlib", "torch-fidelity"]

setup(
    name="stable-diffusion-toolkit",
    version="0.1.0",
    description="The reference command-line toolkit for Stable Diffusion",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ldm", "ldm.*"]),
    install_requires=[
        "einops",
        "filelock",
        "ftfy",
        "invisible-watermark",
        "numpy",
        "omegaconf",
        "open_clip_torch",  # carries CLIP's vocabulary
        "packaging",
        "pathvalidate",
        "pillow",
        "pytorch-lightning",
        "regex",
        "safetensors",
        "spandrel",  # pixel upscalers
        "tokenizers",
        "torch>=2.11",
        "tqdm",
        "transformers",
    ],
    extras_require={
        "training": TRAINING,
        "evaluation": EVALUATION,
        "openvino": ["openvino"],  # --compile on a CPU
        "benchmark": ["accelerate", "diffusers", "matplotlib", "openvino"],
        "test": [
            "accelerate",  # peft imports it
            "diffusers",
            "hypothesis",
            "lycoris_lora",
            "openvino",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scipy",
            "toml",  # lycoris_lora imports it
            *TRAINING,
            *EVALUATION,
        ],
    },
)
