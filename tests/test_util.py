"""What a config section may build, and what its errors name."""

import sys

import pytest
from networks import MINI_YAML, V1_YAML
from omegaconf import OmegaConf

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentInpaintDiffusion
from ldm.util import check_params, get_obj_from_str, instantiate_from_config, parameters


def test_an_unknown_key_is_an_error_that_names_the_nearest():
    """The original's answer was Python's TypeError; some classes swallowed unknown keys in **kwargs."""
    config = OmegaConf.load(V1_YAML).model
    config.params.unet_config.params.modle_channels = 320
    with pytest.raises(InputError, match=r"UNetModel has no parameter 'modle_channels'.*'model_channels'"):
        instantiate_from_config(config)


@pytest.fixture
def foreign_module(tmp_path, monkeypatch) -> str:
    """The name of an importable module outside `ldm`, not yet imported."""
    (tmp_path / "foreign_package.py").write_text("def make(**params): return params\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "foreign_package"
    sys.modules.pop("foreign_package", None)


@pytest.mark.parametrize(
    "target", ["{}.make", "ldm.{}.make", "ldmx.{}.make", "os.system", "torch.nn.Linear", "os", ""]
)
def test_a_forbidden_target_is_refused_and_not_imported(foreign_module, target):
    """A config came from the net with the checkpoint, and the original imported whatever it named."""
    with pytest.raises(InputError, match="config target"):
        instantiate_from_config({"target": target.format(foreign_module)})
    assert foreign_module not in sys.modules


def test_a_forbidden_target_deeper_in_a_config(foreign_module):
    config = OmegaConf.load(MINI_YAML).model
    config.params.first_stage_config = {"target": f"{foreign_module}.make"}
    with pytest.raises(InputError, match="is not allowed"):
        instantiate_from_config(config)
    assert foreign_module not in sys.modules


def test_a_config_cannot_allow_itself(foreign_module):
    inner = {"target": f"{foreign_module}.make"}
    params = {"config": inner, "allow_target": [foreign_module]}
    with pytest.raises(InputError, match="config target"):
        instantiate_from_config({"target": "ldm.util.instantiate_from_config", "params": params})
    assert foreign_module not in sys.modules


@pytest.mark.parametrize("name", ["get_obj_from_str", "check_params", "importlib", "Mapping"])
def test_only_classes_of_ldm_are_called(foreign_module, name):
    """A module's helpers and imports are no models: one of them imports what it is told to."""
    params = {"target": f"{foreign_module}.make", "allow": [foreign_module]}
    with pytest.raises(InputError, match="config target"):
        instantiate_from_config({"target": f"ldm.util.{name}", "params": params})
    assert foreign_module not in sys.modules


def test_a_prefix_that_the_user_allows(foreign_module):
    config = {"target": f"{foreign_module}.make", "params": {"a": 1}}
    assert instantiate_from_config(config, allow_target=[foreign_module]) == {"a": 1}
    assert instantiate_from_config({"target": "torch.nn.Identity"}).training
    with pytest.raises(InputError, match="does not exist"):
        get_obj_from_str(f"{foreign_module}.absent", [foreign_module])


@pytest.mark.parametrize("config", [None, "__is_first_stage__", {}, {"params": {}}])
def test_a_section_without_a_target(config):
    with pytest.raises(InputError, match="needs a 'target'"):
        instantiate_from_config(config)


def test_parameters_of_a_base_class_are_known():
    """Of a class that hands its further parameters on; one that does not has its own only."""
    assert {"concat_keys", "parameterization", "allow_target"} <= set(parameters(LatentInpaintDiffusion))
    assert "params" not in parameters(LatentInpaintDiffusion)

    class Own(LatentInpaintDiffusion):
        def __init__(self, width: int):
            super().__init__()

    assert parameters(Own) == ["width"]
    assert parameters(check_params) == ["owner", "params", "ignored"]
