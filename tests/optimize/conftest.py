import copy

import pytest
import torch
from tiny_sampling import tiny_model

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.weights.loading import SMALL_CONFIG, SMALL_WEIGHTS, find, load_model, read_config


@pytest.fixture
def model() -> LatentDiffusion:
    """The miniature, ready to sample from; a new one for each test."""
    return tiny_model()


@pytest.fixture(scope="session")
def loaded_bundled() -> LatentDiffusion:
    with torch.inference_mode(False):
        return load_model(read_config(find(SMALL_CONFIG)), find(SMALL_WEIGHTS))


@pytest.fixture
def bundled(loaded_bundled: LatentDiffusion) -> LatentDiffusion:
    """The bundled model; a new one for each test."""
    with torch.inference_mode(False):
        return copy.deepcopy(loaded_bundled)
