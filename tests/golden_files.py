"""The golden files: recorded outputs of the reference implementations and their stand-in weights.

They lie in `../shared/golden` beside the checkout; `tests/golden` holds copies of some of them.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors import safe_open

COPIES = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared/golden"


def golden_file(name: str) -> Path:
    """Where a golden file is; FileNotFoundError if it is in neither place."""
    for folder in (SHARED, COPIES):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is neither in {SHARED} nor in {COPIES}")


def case(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a recorded case, and how it was made."""
    with safe_open(golden_file(f"cases/{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def manifest(name: str) -> dict[str, list]:
    """A checkpoint family's state dict as key -> [dtype, shape]."""
    return json.loads(golden_file(f"manifests/{name}.json").read_text())


def pseudo_state_dict(listed: dict[str, list]) -> dict[str, torch.Tensor]:
    """The stand-in weights for (part of) a manifest."""
    spec = importlib.util.spec_from_file_location("pseudo_weights", golden_file("pseudo_weights.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pseudo_state_dict(listed)
