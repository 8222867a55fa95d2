"""Package of the toolkit; pinned versions stand in constraints.txt."""

from setuptools import find_packages, setup

TRAINING = ["codecarbon", "matplotlib", "pyarrow", "tensorboard", "webdataset"]
EVALUATION = ["matplotlib", "torch-fidelity"]
SERVICE = ["fastapi", "httpx2", "prometheus-client", "python-multipart", "uvicorn"]
PROVENANCE = ["c2pa-python", "cryptography"]
WEBUI = ["fastapi", "gradio", "prometheus-client", "uvicorn"]

setup(
    name="stable-diffusion-toolkit",
    version="0.1.0",
    description="The reference command-line toolkit for Stable Diffusion",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm.webui": ["*.css", "*.js"]},
    install_requires=[
        "einops",
        "filelock>=3.30",  # its locks can be told not to fall back to soft ones
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
        "service": SERVICE,
        "provenance": PROVENANCE,
        "webui": WEBUI,
        "openvino": ["openvino"],  # --compile on a CPU
        "benchmark": ["accelerate", "diffusers", "matplotlib", "openvino"],
        "test": [
            "accelerate",  # peft imports it
            "diffusers",
            "hypothesis",
            "lycoris_lora",
            "httpx",
            "openai",
            "openvino",
            "peft",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff",
            "schemathesis",
            "scipy",
            "toml",  # lycoris_lora imports it
            "webuiapi",
            *TRAINING,
            *EVALUATION,
            *SERVICE,
            *PROVENANCE,
            *WEBUI,
        ],
    },
)
