"""Training of both stages by scripts/train.py, on a few tiny pictures."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm.cli import entry
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.weights.loading import load_model, read_config

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import train

DDCONFIG = {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "num_groups": 4}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": DDCONFIG},
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 8,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [1],
    "num_heads": 2,
    "context_dim": 8,
    "num_groups": 4,
}
TRAINING = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "images": 64,
    "image_size": 32,
    "warmup": 2,
    "checkpoint_every": 3,
    "sample_every": 3,
}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a first stage that scripts/train.py trained."""
    folder = tmp_path_factory.mktemp("first-stage")
    base = folder / "first.yaml"
    base.write_text(yaml.safe_dump({"model": FIRST_STAGE, "training": TRAINING}))
    assert entry.run(train.main, ["--base", str(base), "--logdir", str(folder)]) == 0
    return folder / "first" / "model.safetensors"


def second_stage(folder: Path, first_stage: Path) -> list[str]:
    """Arguments that train a second stage in `folder`."""
    params = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
        "first_stage_config": FIRST_STAGE,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"width": 8, "layers": 1, "heads": 2},
        },
        "channels": 4,
        "image_size": 4,
        "cond_stage_trainable": True,
        "scale_by_std": True,
        "use_ema": False,
        "linear_start": 0.00085,
        "linear_end": 0.012,
    }
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    training = TRAINING | {"first_stage": str(first_stage), "drill": ["left", "right"]}
    base = folder / "second.yaml"
    base.write_text(yaml.safe_dump({"model": model, "training": training}))
    return ["--base", str(base), "--logdir", str(folder)]


def test_first_stage_learns_and_logs_pictures(first_stage: Path) -> None:
    assert sorted(path.name for path in first_stage.parent.glob("*.png")) == [
        "step-000003.png",
        "step-000006.png",
    ]
    assert "psnr" in (first_stage.parent / "metrics.csv").read_text()
    assert all(tensor.isfinite().all() for tensor in load_file(first_stage).values())


def test_second_stage_loads_like_any_checkpoint(first_stage: Path, tmp_path: Path) -> None:
    arguments = second_stage(tmp_path, first_stage)
    assert entry.run(train.main, arguments) == 0
    weights = tmp_path / "second" / "model.safetensors"
    state = load_file(weights)
    assert state["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert state["model.diffusion_model.out.2.weight"].abs().max() > 0, (
        "the zero-initialised layer was trained"
    )
    assert state["scale_factor"].dtype == torch.float32
    model = load_model(read_config(tmp_path / "second.yaml"), weights)
    assert model.get_learned_conditioning(["a red cube"]).shape == (1, 77, 8)


def test_resumed_run_equals_undisturbed_run(first_stage: Path, tmp_path: Path) -> None:
    """Training that is stopped and started again ends with the weights of a run that never stopped."""
    states = []
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        folder = tmp_path / name
        folder.mkdir()
        arguments = second_stage(folder, first_stage)
        for stop in stops:
            assert entry.run(train.main, [*arguments, "--stop_at", str(stop)]) == 0
        states.append(load_file(folder / "second" / "model.safetensors"))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0, msg=name)


def test_bad_training_section_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "bad.yaml"
    base.write_text(yaml.safe_dump({"model": FIRST_STAGE, "training": TRAINING | {"learning_rat": 1}}))
    assert entry.run(train.main, ["--base", str(base), "--logdir", str(tmp_path)]) == 2
    assert re.fullmatch(
        r".*no parameter 'learning_rat'; did you mean 'learning_rate'\?\n", capsys.readouterr().err
    )


def test_drill_needs_captions_with_its_words(
    first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = second_stage(tmp_path, first_stage)
    base = tmp_path / "second.yaml"
    base.write_text(base.read_text().replace("- right", "- horse").replace("- left", "- horse"))
    assert entry.run(train.main, arguments) == 2
    assert "drill: no caption has one of the words horse, horse" in capsys.readouterr().err


def test_a_second_sitting_starts_from_weights(first_stage: Path, tmp_path: Path) -> None:
    """Its YAML goes over the first one's: other captions, timesteps and steps, no first stage of its own."""
    assert entry.run(train.main, second_stage(tmp_path, first_stage)) == 0
    init = tmp_path / "second" / "model.safetensors"
    drill = tmp_path / "drill.yaml"
    changes = {"init": str(init), "first_stage": None, "steps": 2, "learning_rate": 0.0}
    drill.write_text(
        yaml.safe_dump({"training": changes | {"drill": ["left"], "drill_timesteps": [200, 950]}})
    )
    arguments = ["--base", str(tmp_path / "second.yaml"), str(drill), "--logdir", str(tmp_path)]
    assert entry.run(train.main, arguments) == 0
    before, after = load_file(init), load_file(tmp_path / "drill" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)


def test_drilled_captions_and_timesteps(first_stage: Path, tmp_path: Path, monkeypatch) -> None:
    """A share of each batch has one of the words, at timesteps in the range; the rest is as ever."""
    arguments = second_stage(tmp_path, first_stage)
    base = tmp_path / "second.yaml"
    changes = {"drill_share": 0.75, "drill_timesteps": [400, 500], "prompt_dropout": 0.0, "batch_size": 8}
    content = yaml.safe_load(base.read_text())
    base.write_text(yaml.safe_dump(content | {"training": content["training"] | changes}))
    seen = []
    p_losses = LatentDiffusion.p_losses
    monkeypatch.setattr(
        LatentDiffusion, "p_losses", lambda self, x, c, t, n: (seen.append(t), p_losses(self, x, c, t, n))[1]
    )
    tokens = []
    embed = FrozenCLIPEmbedder.forward_tokens
    monkeypatch.setattr(
        FrozenCLIPEmbedder, "forward_tokens", lambda self, x: (tokens.append(x), embed(self, x))[1]
    )
    assert entry.run(train.main, [*arguments, "--stop_at", "2"]) == 0
    words = torch.tensor([CLIPTokenizer().encode(word)[0] for word in ("left", "right")])
    for t, captions in zip(seen[:2], tokens[:2], strict=True):
        assert ((t[:6] >= 400) & (t[:6] < 500)).all()
        assert t[6] < 500 <= t[7]
        assert torch.isin(captions[:6], words).any(dim=1).all()
