from pathlib import Path

import pytest
from tiny_training import FIRST_STAGE, run_train, scenes, write_yaml


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a first stage that scripts/train.py trained."""
    folder = tmp_path_factory.mktemp("first-stage")
    assert run_train(*write_yaml(folder / "first.yaml", FIRST_STAGE, scenes(16), sample_every=3)) == 0
    return folder / "first" / "model.safetensors"
