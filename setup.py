"""Package of the toolkit; pinned versions stand in constraints.txt."""

from setuptools import find_packages, setup

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
        "test": ["diffusers", "hypothesis", "openvino", "pytest", "pytest-xdist", "ruff", "scipy"],
        "benchmark": ["accelerate", "diffusers", "matplotlib", "openvino"],
        "openvino": ["openvino"],  # --compile on a CPU
    },
)
