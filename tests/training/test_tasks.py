"""What a training step draws, the learning rate, and where a task starts from."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_training import FIRST_STAGE, TRAINING, new_model, run_train, second_stage

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.training.config import training_config
from ldm.training.tasks import FirstStageTask, LatentDiffusionTask, Task, stratified
from ldm.util import instantiate_from_config


def test_one_number_from_each_part() -> None:
    numbers = stratified(10, 200, 300, torch.Generator().manual_seed(0))
    edges = 200 + 10 * torch.arange(11)
    assert ((numbers >= edges[:-1]) & (numbers < edges[1:])).all()
    assert stratified(0, 0, 1000, torch.Generator()).shape == (0,)


def test_no_number_is_beyond_the_schedule() -> None:
    """In float32 63 + rand rounded up to 64, so t became 1000: about 2 % of runs of 10,000 steps crashed."""
    numbers = stratified(64, 0, 1000, torch.Generator().manual_seed(141668))
    assert numbers.long().max() == 999
    drawn = torch.rand(64, generator=torch.Generator().manual_seed(141668))
    assert torch.equal(numbers[:-1], ((torch.arange(64) + drawn) * 1000 / 64)[:-1])


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, [1, 0.75, 0.25]), (1, [1, 0.75, 0.25]), (2, [0.5, 0.75, 0.25]), (4, [0.25, 0.5, 0.25])],
)
def test_the_learning_rate_rises_then_falls_along_a_cosine(warmup: int, expected: list[float]) -> None:
    """A warmup of 0 divided by zero."""
    config = training_config(TRAINING | {"warmup": warmup, "steps": 3, "learning_rate": 0.1})
    schedule = Task(torch.nn.Linear(1, 1), config).configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(3):
        rates += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1 * factor for factor in expected])


def test_averaged_weights_are_put_back() -> None:
    torch.manual_seed(0)
    task = Task(torch.nn.Linear(1, 1), training_config(TRAINING))
    start = task.model.weight.item()
    with torch.no_grad():
        task.model.weight.add_(1)
    with task.averaged_weights():
        assert task.model.weight.item() == start
    assert task.model.weight.item() == start + 1
    assert task.averaged_state()["weight"].item() == start


def test_few_images_make_a_grid_of_two_rows() -> None:
    config = training_config(TRAINING | {"images": 3})
    grid = FirstStageTask(instantiate_from_config(FIRST_STAGE), config).sample_grid()
    assert grid.shape == (2 * 34 + 2, 3 * 34 + 2, 3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "training: a second stage needs the weights of its first_stage, or those of init"),
        ({"first_stage": "absent.st"}, "training: first_stage: there is no file absent.st"),
        ({"init": "absent.st", "first_stage": "x"}, "training: init: there is no file absent.st"),
        ({"image_size": 36}, "training: image_size must be a multiple of 8, not 36"),
        (
            {"drill": ["left"], "drill_timesteps": [0, 1001]},
            "training: drill_timesteps must end by 1000, not 1001",
        ),
    ],
)
def test_a_second_stage_that_cannot_start(changes: dict, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        LatentDiffusionTask(
            new_model(), training_config(TRAINING | changes), tmp_path / "latents.safetensors"
        )
    assert str(error.value) == why
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_first_stage(tmp_path: Path) -> None:
    other = FIRST_STAGE["params"] | {"ddconfig": FIRST_STAGE["params"]["ddconfig"] | {"ch": 16}}
    weights = tmp_path / "other.ckpt"
    torch.save(instantiate_from_config(FIRST_STAGE | {"params": other}).state_dict(), weights)
    config = training_config(TRAINING | {"first_stage": str(weights)})
    with pytest.raises(InputError, match=r"other\.ckpt looks like .* weights have another shape"):
        LatentDiffusionTask(new_model(), config, tmp_path / "latents.safetensors")


def test_a_first_stage_of_another_factor() -> None:
    with pytest.raises(InputError, match="training: image_size must be a multiple of 8, not 36"):
        FirstStageTask(instantiate_from_config(FIRST_STAGE), training_config(TRAINING | {"image_size": 36}))


def test_drill_needs_captions_with_its_words(first_stage: Path, tmp_path: Path) -> None:
    section = TRAINING | {"first_stage": str(first_stage), "drill": ["horse", "horses"]}
    with pytest.raises(InputError, match="drill: no caption has one of the words horse, horses"):
        LatentDiffusionTask(new_model(), training_config(section), tmp_path / "latents.safetensors")


def test_drilled_captions_and_timesteps(
    first_stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of each batch has one of the words, at timesteps in the range; the rest has any."""
    drill = {"drill_share": 0.75, "drill_timesteps": [400, 500], "prompt_dropout": 0.0, "batch_size": 8}
    arguments = second_stage(tmp_path, first_stage, **drill)
    timesteps, tokens = [], []
    p_losses, embed = LatentDiffusion.p_losses, FrozenCLIPEmbedder.forward_tokens

    def observed_losses(self, x0, cond, t, noise):
        timesteps.append(t)
        return p_losses(self, x0, cond, t, noise)

    def observed_embedding(self, x):
        tokens.append(x)
        return embed(self, x)

    monkeypatch.setattr(LatentDiffusion, "p_losses", observed_losses)
    monkeypatch.setattr(FrozenCLIPEmbedder, "forward_tokens", observed_embedding)
    assert run_train(*arguments, "--stop_at", "2") == 0
    assert len(timesteps) == 2
    words = torch.tensor([CLIPTokenizer().encode(word)[0] for word in ("left", "right")])
    for t, captions in itertools.zip_longest(timesteps, tokens):
        assert ((t[:6] >= 400) & (t[:6] < 500)).all()
        assert t[6] < 500 <= t[7]
        assert torch.isin(captions[:6], words).any(dim=1).all()
