"""What a training step draws, the learning rate, and where a task starts from."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    DEPTH,
    ESTIMATOR,
    FIRST_STAGE,
    FIRST_STAGE_X4,
    INPAINTING,
    TRAINING,
    UPSCALER,
    new_model,
    run_train,
    second_stage,
)

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.training import latents
from ldm.training.config import training_config
from ldm.training.linear import start_linear
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


def sibling(config: dict, init: Path, tmp_path: Path, **training: Any) -> LatentDiffusionTask:
    """A task that starts from the weights of a text-to-image model."""
    torch.manual_seed(1)
    section = TRAINING | {"images": 8, "init": str(init)} | training
    return LatentDiffusionTask(
        instantiate_from_config(config), training_config(section), tmp_path / "latents.safetensors"
    )


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a text-to-image model, none of them zero."""
    torch.manual_seed(0)
    model = new_model()
    for weight in model.model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("text") / "model.ckpt"
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("config", [INPAINTING, DEPTH], ids=["inpainting", "depth"])
@torch.no_grad()
def test_channels_that_grow_with_zeros_change_nothing_at_first(
    config: dict, text_model: Path, tmp_path: Path
) -> None:
    model = sibling(config, text_model, tmp_path).model
    plain = new_model()
    plain.load_state_dict(torch.load(text_model))
    x, t, context = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.randn(2, 77, 8)
    further = model.model.diffusion_model.in_channels - 4
    cond = {"c_crossattn": [context], "c_concat": [torch.randn(2, further, 4, 4)]}
    torch.testing.assert_close(model.apply_model(x, t, cond), plain.apply_model(x, t, context))


def test_only_the_unet_of_a_sibling_is_trained(text_model: Path, tmp_path: Path) -> None:
    task = sibling(INPAINTING, text_model, tmp_path)
    before = {name: weight.clone() for name, weight in task.model.named_parameters()}
    optimizer = task.configure_optimizers()["optimizer"]
    task.log = lambda *_, **__: None
    task.training_step(0, 0).backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, w in task.model.named_parameters() if not w.equal(before[name])}
    assert changed == {"model"}
    name = "model.diffusion_model.input_blocks.0.0.weight"
    grown = dict(task.model.named_parameters())[name][:, 4:]
    assert grown.abs().max() > 0, "the channels of mask and masked image are learned"


def test_a_depth_estimator_comes_from_its_own_file(text_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    estimator = instantiate_from_config(ESTIMATOR)
    torch.save(estimator.state_dict(), tmp_path / "depth.ckpt")
    task = sibling(DEPTH, text_model, tmp_path, depth_model=str(tmp_path / "depth.ckpt"))
    for name, weight in estimator.state_dict().items():
        assert torch.equal(weight, task.averaged_state()[f"depth_model.{name}"])
    with pytest.raises(InputError, match="a LatentInpaintDiffusion has no depth estimator"):
        sibling(INPAINTING, text_model, tmp_path, depth_model=str(tmp_path / "depth.ckpt"))


def upscaler(folder: Path, text_model: Path, **training: Any) -> LatentDiffusionTask:
    torch.manual_seed(3)
    first_stage = instantiate_from_config(FIRST_STAGE_X4)
    start_linear(first_stage)
    torch.save(first_stage.state_dict(), folder / "first.ckpt")
    section = TRAINING | {"images": 4, "image_size": 64, "crop": 32, "batch_size": 2, "linear_start": True}
    section |= {"first_stage": str(folder / "first.ckpt"), "text_encoder": str(text_model)} | training
    model = instantiate_from_config(UPSCALER)
    return LatentDiffusionTask(model, training_config(section), folder / "latents.safetensors")


def test_an_upscaler_learns_from_parts_of_large_images(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the text encoder of another model, and starts from the small image: its loss is low at once."""
    task = upscaler(tmp_path, text_model)
    task.log = lambda *_, **__: None
    expected = torch.load(text_model)
    for name, weight in task.model.cond_stage_model.state_dict().items():
        assert torch.equal(weight, expected[f"cond_stage_model.{name}"])
    assert task.mean.shape == (4, 4, 16, 16)
    assert task.concat.shape == (4, 3, 16, 16)
    seen = []
    apply_model = LatentDiffusion.apply_model

    def observed(self, x, t, cond):
        seen.append((x, cond))
        return apply_model(self, x, t, cond)

    monkeypatch.setattr(LatentDiffusion, "apply_model", observed)
    loss = task.training_step(0, 0)
    ((x, cond),) = seen
    assert x.shape == (2, 4, 8, 8)
    assert cond["c_concat"][0].shape == (2, 3, 8, 8)
    assert cond["c_adm"].shape == (2,)
    loss.backward()
    assert loss < 1.5
    labels = task.model.model.diffusion_model.label_emb.weight
    near, far = ((labels[20] - labels[k]).square().mean() for k in (21, 300))
    assert near < far / 10, "neighbouring noise levels begin alike"


def test_latents_and_small_image_are_cut_alike(text_model: Path, tmp_path: Path) -> None:
    task = upscaler(tmp_path, text_model)
    latents = torch.arange(256.0).reshape(1, 1, 16, 16).expand(2, 4, -1, -1)
    cut, concat = task.cropped(latents, 1000 + latents[:, :3], torch.Generator().manual_seed(0))
    assert cut.shape == (2, 4, 8, 8)
    assert torch.equal(concat, 1000 + cut[:, :3])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text_encoder": "absent.st"}, "training: text_encoder: there is no file absent.st"),
        ({"crop": 30}, "training: crop must be a multiple of 4, not 30"),
        ({"crop": 128}, "training: crop must be at most image_size, 64, not 128"),
    ],
)
def test_an_upscaler_that_cannot_start(changes: dict, why: str, text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        upscaler(tmp_path, text_model, **changes)
    assert str(error.value) == why


def test_a_linear_start_needs_a_small_image(text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="linear_start: a LatentInpaintDiffusion is given no small image"):
        sibling(INPAINTING, text_model, tmp_path, linear_start=True)


def test_a_decoder_is_trained_alone() -> None:
    section = TRAINING | {"images": 4, "linear_start": True, "decoder_only": True, "latent_noise": 0.1}
    torch.manual_seed(4)
    task = FirstStageTask(instantiate_from_config(FIRST_STAGE_X4), training_config(section))
    task.log = lambda *_, **__: None
    before = {name: weight.clone() for name, weight in task.model.named_parameters()}
    optimizer = task.configure_optimizers()["optimizer"]
    task.training_step(0, 0).backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, w in task.model.named_parameters() if not w.equal(before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_softened_images_went_through_the_bundled_first_stage(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft = instantiate_from_config(FIRST_STAGE)
    monkeypatch.setattr(latents, "bundled_first_stage", lambda _: soft)
    (tmp_path / "soft").mkdir()
    plain = upscaler(tmp_path, text_model).concat
    all_soft = upscaler(tmp_path / "soft", text_model, soften=1.0).concat
    assert ((all_soft - plain).abs().amax((1, 2, 3)) > 0.1).all()


def test_drilled_timesteps_of_any_captions(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without words the share of a batch with timesteps of its own has whatever captions come."""
    drill = {"drill_share": 0.75, "drill_timesteps": [600, 700], "batch_size": 8}
    task = sibling(INPAINTING, text_model, tmp_path, **drill)
    task.log = lambda *_, **__: None
    seen: list[torch.Tensor] = []
    p_losses = LatentDiffusion.p_losses

    def observed(self, x0, cond, t, noise):
        seen.append(t)
        return p_losses(self, x0, cond, t, noise)

    monkeypatch.setattr(LatentDiffusion, "p_losses", observed)
    task.training_step(0, 0)
    (t,) = seen
    assert ((t[:6] >= 600) & (t[:6] < 700)).all()
    assert t[6] < 500 <= t[7]
