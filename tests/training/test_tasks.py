"""The loss of each stage, what is trained, and where a task starts from."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import case, manifest, pseudo_state_dict
from networks import MINI_YAML
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_training import (
    DEPTH,
    ESTIMATOR,
    FIRST_STAGE,
    FIRST_STAGE_X4,
    INPAINTING,
    SECOND_STAGE,
    TRAINING,
    UPSCALER,
    new_model,
)
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.config import training_config
from ldm.training.data.config import data_config
from ldm.training.linear import start_linear
from ldm.training.start import new_task
from ldm.training.tasks import DepthTask, FirstStageTask, LatentDiffusionTask, Task
from ldm.util import instantiate_from_config
from ldm.weights.checkpoint import read_state_dict

V = {**SECOND_STAGE, "params": {**SECOND_STAGE["params"], "parameterization": "v"}}


def task_of(config: dict = SECOND_STAGE, **training: Any) -> LatentDiffusionTask:
    """A task whose weights are random, none of them zero."""
    torch.manual_seed(0)
    model = instantiate_from_config(config)
    for weight in model.model.parameters():
        nn.init.normal_(weight, std=0.1)
    return LatentDiffusionTask(model, training_config(TRAINING | {"prompt_dropout": 0.0} | training))


def batch_of(count: int = 4, size: int = 4, **more: Any) -> dict[str, Any]:
    """A batch of cached latents."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(count, 4, size, size, generator=generator)
    captions = [f"a red cube and {k} spheres" for k in range(count)]
    rows = {"step": 3, "row": torch.arange(count), "caption": captions}
    return rows | {"mean": mean, "std": torch.full_like(mean, 0.1)} | more


def images(count: int = 2, size: int = 32, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return {"step": 0, "row": torch.arange(count), "caption": [""] * count, "image": image} | more


def observed(task: LatentDiffusionTask, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """What p_losses is given: (x0, conditions, t, noise) of every call."""
    calls: list[tuple[Tensor, ...]] = []
    p_losses = LatentDiffusion.p_losses

    def losses(self: LatentDiffusion, *given: Tensor) -> Tensor:
        calls.append(given)
        return p_losses(self, *given)

    monkeypatch.setattr(LatentDiffusion, "p_losses", losses)
    return calls


@pytest.fixture(scope="module")
def reference() -> LatentDiffusion:
    """The model of the recorded loss, but for its text encoder."""
    config = OmegaConf.load(MINI_YAML).model
    config.params.cond_stage_config = {"target": "torch.nn.Identity"}
    model = instantiate_from_config(config)
    listed = {k: v for k, v in manifest("mini-v1").items() if not k.startswith("cond_stage_model.")}
    model.load_state_dict(pseudo_state_dict(listed))
    return model


def test_the_loss_of_the_reference(reference: LatentDiffusion) -> None:
    """The recorded loss of the original's training code."""
    tensors = case("loss_mini-v1")[0]
    task = LatentDiffusionTask(reference, training_config(TRAINING))
    with torch.no_grad():
        losses = task.denoising_losses(*(tensors[name] for name in ("x0", "cond", "t", "noise")))
    torch.testing.assert_close(losses.mean(), tensors["loss"].squeeze(), rtol=0, atol=1e-5)


def test_the_loss_of_v_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an output of zero it is the mean of (sqrt(a) noise - sqrt(1 - a) x0)^2."""
    task = task_of(V)
    for weight in task.unet.out[2].parameters():
        nn.init.zeros_(weight)
    calls = observed(task, monkeypatch)
    losses = task.losses(batch_of())
    ((x0, _, t, noise),) = calls
    a = task.model.alphas_cumprod[t][:, None, None, None]
    expected = (a.sqrt() * noise - (1 - a).sqrt() * x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("config", [SECOND_STAGE, V], ids=["eps", "v"])
def test_min_snr_weighs_the_loss(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = observed(plain := task_of(config), monkeypatch)
    losses, weighted = plain.losses(batch_of()), task_of(config, min_snr_gamma=5.0).losses(batch_of())
    a = plain.model.alphas_cumprod[calls[0][2]].double()
    snr = a / (1 - a)
    factor = snr.clamp(max=5) / (snr if config is SECOND_STAGE else snr + 1)
    torch.testing.assert_close(weighted.double(), losses.double() * factor)
    assert factor.min() < 0.9


def test_what_an_example_draws_depends_on_its_row_alone() -> None:
    task = task_of(noise_offset=0.1, prompt_dropout=0.5)
    batch = batch_of(4)
    parts = [{n: v[k : k + 1] if n != "step" else v for n, v in batch.items()} for k in range(4)]
    whole = task.losses(batch)
    torch.testing.assert_close(torch.cat([task.losses(part) for part in parts]), whole)
    assert not torch.equal(whole, task.losses(batch | {"step": 4}))


def test_latents_are_a_sample_of_the_posterior() -> None:
    task = task_of()
    task.model.scale_factor.fill_(2.0)
    latents = task.latents(batch_of(16, 8))
    deviations = latents / 2 - batch_of(16, 8)["mean"]
    assert deviations.std().item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(task.latents(batch_of(16, 8) | {"step": 4}), latents)


def test_images_are_encoded_in_a_step() -> None:
    task, batch = task_of(), images()
    posterior = task.model.encode_first_stage(batch["image"])
    cached = {n: v for n, v in batch.items() if n != "image"} | {"mean": posterior.mean, "std": posterior.std}
    torch.testing.assert_close(task.losses(batch), task.losses(cached))


def test_noise_offset_shifts_whole_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the noise, one number a channel has the given standard deviation; the loss predicts the sum."""
    plain, shifted = task_of(), task_of(noise_offset=0.5)
    shape, batch = (4, 8, 8), batch_of(64)
    difference = shifted.noise(batch, shape) - plain.noise(batch, shape)
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference))
    assert difference[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.15)


def test_a_share_of_captions_is_dropped() -> None:
    task = task_of(prompt_dropout=0.25)
    dropped = [text == "" for step in range(50) for text in task.captions(batch_of() | {"step": step})]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.08)
    assert "" not in task_of().captions(batch_of(64))


def test_the_schedule_of_zero_terminal_snr() -> None:
    """Lin et al. 2023, algorithm 1: the last timestep is nothing but noise, the first is as it was."""
    task, plain = task_of(V, zero_terminal_snr=True), task_of(V)
    x, noise, t = torch.ones(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor([999])
    torch.testing.assert_close(task.model.q_sample(x, t, noise), noise, rtol=0, atol=1e-3)
    torch.testing.assert_close(task.model.get_v(x, noise, t), -x, rtol=0, atol=1e-3)
    a, b = task.model.alphas_cumprod.sqrt(), plain.model.alphas_cumprod.sqrt()
    expected = (b - b[-1]) * b[0] / (b[0] - b[-1])
    torch.testing.assert_close(a[:-1], expected[:-1])
    assert task.losses(batch_of()).isfinite().all()
    with pytest.raises(InputError, match="zero_terminal_snr needs a model with parameterization: v"):
        task_of(zero_terminal_snr=True)


@pytest.mark.parametrize("config", [SECOND_STAGE, INPAINTING], ids=["text", "inpainting"])
def test_checkpointing_gives_the_same_gradients(config: dict) -> None:
    gradients = []
    channels = config["params"]["unet_config"]["params"]["in_channels"] - 4
    more = {"concat": torch.randn(4, channels, 4, 4)} if channels else {}
    for checkpointing in (False, True):
        task = task_of(config, checkpointing=checkpointing)
        task.training_step(batch_of(**more)).backward()
        gradients.append({name: weight.grad for name, weight in task.trained().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    """What lives from the forward to the backward pass, with 16 x 16 latents."""
    kept = []
    for checkpointing in (False, True):
        task, total = task_of(checkpointing=checkpointing), 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            task.training_step(batch_of(size=16))
        kept.append(total)
    assert kept[1] < kept[0] / 3


def test_the_validation_loss_is_the_same_every_time() -> None:
    task = task_of(validation_timesteps=[100, 900], prompt_dropout=0.5, min_snr_gamma=5.0)
    losses = task.validation_losses(batch_of())
    assert torch.equal(losses, task.validation_losses(batch_of()))
    assert losses.shape == (4,)
    assert not losses.requires_grad
    single = [task_of(validation_timesteps=[t]).validation_losses(batch_of()) for t in (100, 900)]
    torch.testing.assert_close(losses, sum(single) / 2)


def test_trained_weights_and_their_names() -> None:
    text = task_of().trained()
    assert {name.split(".")[0] for name in text} == {"model", "cond_stage_model"}
    task = task_of(INPAINTING)
    assert {name.split(".")[0] for name in task.trained()} == {"model"}
    assert all(weight.requires_grad for weight in task.trained().values())
    assert sum(w.requires_grad for w in task.parameters()) == len(task.trained())
    names = task.names()
    assert names["model.model.diffusion_model.out.2.bias"] == "model.diffusion_model.out.2.bias"
    assert set(names.values()) == set(task.model.state_dict())


def test_a_subclass_that_trains_other_weights() -> None:
    """Fine-tuning adds weights of its own, whose names in a checkpoint are not those in the module."""

    class Offsets(LatentDiffusionTask):
        whole = False

        def __init__(self, *given: Any):
            given[0].offset = nn.Parameter(torch.zeros(77, 8))
            super().__init__(*given)

        def trained(self) -> dict[str, nn.Parameter]:
            return {"offset_of_text": self.model.offset}

        def embed(self, captions: list[str]) -> Tensor:
            return super().embed(captions) + self.model.offset

    task = Offsets(new_model(), training_config(TRAINING))
    assert task.names() == {"model.offset": "offset_of_text"}
    for weight in task.unet.parameters():
        nn.init.normal_(weight, std=0.1)
    task.training_step(batch_of()).backward()
    assert task.model.offset.grad.abs().max() > 0
    assert all(weight.grad is None for weight in task.unet.parameters())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "training: a latent diffusion model needs the weights of its first_stage, or of init"),
        ({"first_stage": "absent.st"}, "training: first_stage: there is no file "),
        ({"init": "absent.st", "first_stage": "x"}, "training: init: there is no file "),
        ({"linear_start": True}, "training: linear_start: a LatentDiffusion is given no small image"),
        ({"depth_model": "x"}, "training: depth_model: a LatentDiffusion has no depth estimator"),
        ({"text_encoder": "absent.st"}, "training: text_encoder: there is no file "),
        ({"drill_timesteps": [0, 1001]}, "training: drill_timesteps: 1000 is none of the model's timesteps"),
        (
            {"validation_timesteps": [5, 1000], "validation_every": 1},
            "training: validation_timesteps: 1000 is none of the model's timesteps, 0 … 999",
        ),
    ],
)
def test_a_second_stage_that_cannot_start(changes: dict, why: str, text_model: Path) -> None:
    start = {} if not changes or "first_stage" in changes else {"init": str(text_model)}
    with pytest.raises(InputError) as error:
        new_task(SECOND_STAGE, training_config(TRAINING | start | changes), None)
    assert str(error.value).startswith(why)


@pytest.mark.parametrize("config", [FIRST_STAGE, SECOND_STAGE], ids=["first", "second"])
def test_sizes_that_do_not_fit_the_first_stage(config: dict, text_model: Path) -> None:
    data = data_config({"train": {"target": "ldm.scenes.source.Scenes"}, "size": 36})
    start = {"init": str(text_model)} if config is SECOND_STAGE else {}
    with pytest.raises(InputError, match="data: size must be a multiple of 8"):
        new_task(config, training_config(TRAINING | start), data)


def test_weights_of_another_first_stage(tmp_path: Path) -> None:
    other = FIRST_STAGE["params"] | {"ddconfig": FIRST_STAGE["params"]["ddconfig"] | {"ch": 16}}
    weights = tmp_path / "other.ckpt"
    torch.save(instantiate_from_config(FIRST_STAGE | {"params": other}).state_dict(), weights)
    with pytest.raises(InputError, match=r"other\.ckpt looks like .* weights have another shape"):
        new_task(SECOND_STAGE, training_config(TRAINING | {"first_stage": str(weights)}), None)


def test_the_first_stage_of_a_whole_model(text_model: Path) -> None:
    task = new_task(SECOND_STAGE, training_config(TRAINING | {"first_stage": str(text_model)}), None)
    expected = torch.load(text_model)["first_stage_model.decoder.conv_in.weight"]
    assert torch.equal(task.model.first_stage_model.decoder.conv_in.weight, expected)
    assert task.is_new


def test_another_first_stage_than_that_of_init(text_model: Path, tmp_path: Path) -> None:
    """With `init`, `first_stage` was ignored without a word."""
    torch.manual_seed(5)
    other = instantiate_from_config(FIRST_STAGE)
    torch.save(other.state_dict(), tmp_path / "other.ckpt")
    start = {"init": str(text_model), "first_stage": str(tmp_path / "other.ckpt")}
    task = new_task(SECOND_STAGE, training_config(TRAINING | start), None)
    found, given = task.model.state_dict(), torch.load(text_model)
    for name, weight in other.state_dict().items():
        assert torch.equal(found[f"first_stage_model.{name}"], weight)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(found[name], given[name])
    assert task.is_new, "the scale of its latents is another"


def test_a_model_that_is_not_trained() -> None:
    section = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    with pytest.raises(InputError, match="the model is FrozenCLIPEmbedder, which is not trained here"):
        new_task(section, training_config(TRAINING), None)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a text-to-image model, none of them zero."""
    torch.manual_seed(0)
    model = new_model()
    for weight in model.model.parameters():
        nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("text") / "model.ckpt"
    torch.save(model.state_dict(), path)
    return path


def sibling(config: dict, init: Path, **training: Any) -> Task:
    """A task that starts from the weights of a text-to-image model."""
    return new_task(config, training_config(TRAINING | {"init": str(init)} | training), None)


@pytest.mark.parametrize("config", [INPAINTING, DEPTH], ids=["inpainting", "depth"])
@torch.no_grad()
def test_channels_that_grow_with_zeros_change_nothing_at_first(config: dict, text_model: Path) -> None:
    model = sibling(config, text_model).model
    plain = new_model()
    plain.load_state_dict(torch.load(text_model))
    x, t, context = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.randn(2, 77, 8)
    further = model.model.diffusion_model.in_channels - 4
    cond = {"c_crossattn": [context], "c_concat": [torch.randn(2, further, 4, 4)]}
    torch.testing.assert_close(model.apply_model(x, t, cond), plain.apply_model(x, t, context))


def test_only_the_unet_of_a_sibling_is_trained(text_model: Path) -> None:
    """Its further channels are learned, too, and the file that it started from is left alone."""
    before = text_model.read_bytes()
    task = sibling(INPAINTING, text_model)
    weights = {name: weight.clone() for name, weight in task.model.named_parameters()}
    mask = (torch.rand(2, 1, 32, 32) > 0.5).float()
    task.training_step(images(mask=mask)).backward()
    torch.optim.AdamW(task.trained().values(), lr=1e-3).step()
    changed = {name.split(".")[0] for name, w in task.model.named_parameters() if not w.equal(weights[name])}
    assert changed == {"model"}
    grown = dict(task.model.named_parameters())["model.diffusion_model.input_blocks.0.0.weight"][:, 4:]
    assert grown.abs().max() > 0
    assert text_model.read_bytes() == before


def test_averaged_weights_are_started_from(text_model: Path, tmp_path: Path) -> None:
    """A checkpoint of a training has both; which, can be said."""
    raw = torch.load(text_model)
    unet = [name for name in raw if name.startswith("model.")]
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": raw[name] + 1 for name in unet}
    torch.save({"state_dict": raw | averages}, tmp_path / "both.ckpt")
    params = {n: v for n, v in SECOND_STAGE["params"].items() if n != "use_ema"}
    for section, which, shift in (
        (SECOND_STAGE | {"params": params}, None, 1),
        (SECOND_STAGE, None, 0),
        (SECOND_STAGE, "ema", 1),
        (SECOND_STAGE | {"params": params}, "raw", 0),
    ):
        task = sibling(section, tmp_path / "both.ckpt", **{"init_weights": which} if which else {})
        name = "model.diffusion_model.out.2.bias"
        assert torch.equal(task.trained()[name], raw[name] + shift), (which, shift)


def test_what_a_file_says_of_its_unet_is_trained(text_model: Path, tmp_path: Path) -> None:
    """A UNet that predicted v was trained on eps, and its schedule was not the one that it was made for."""
    marked = torch.load(text_model) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    torch.save({"state_dict": marked}, tmp_path / "v.ckpt")
    task = sibling(SECOND_STAGE, tmp_path / "v.ckpt")
    assert task.model.parameterization == "v"
    assert task.model.alphas_cumprod[-1] < 1e-6
    assert task.markers().keys() == {"v_pred", "ztsnr"}, "for its own checkpoints"
    plain = sibling(SECOND_STAGE, text_model)
    assert (plain.model.parameterization, plain.markers()) == ("eps", {})
    assert plain.model.alphas_cumprod[-1] > 1e-3


def test_a_depth_estimator_comes_from_its_own_file(text_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    estimator = instantiate_from_config(ESTIMATOR)
    torch.save(estimator.state_dict(), tmp_path / "depth.ckpt")
    task = sibling(DEPTH, text_model, depth_model=str(tmp_path / "depth.ckpt"))
    for name, weight in estimator.state_dict().items():
        assert torch.equal(weight, task.model.state_dict()[f"depth_model.{name}"])
    assert not hasattr(sibling(DEPTH, text_model).model, "depth_model"), "maps have to be given"


def test_the_scale_of_new_latents_is_that_of_unit_variance(text_model: Path) -> None:
    task = new_task(SECOND_STAGE, training_config(TRAINING | {"first_stage": str(text_model)}), None)
    batch = batch_of(64, 8)
    batch["mean"] *= 3
    task.start(batch)
    assert task.latents(batch).std().item() == pytest.approx(1.0, rel=0.05)
    assert not sibling(SECOND_STAGE, text_model).is_new


def upscaler(folder: Path, text_model: Path, **training: Any) -> LatentDiffusionTask:
    torch.manual_seed(3)
    first_stage = instantiate_from_config(FIRST_STAGE_X4)
    start_linear(first_stage)
    torch.save(first_stage.state_dict(), folder / "first.ckpt")
    section = TRAINING | {"batch_size": 8, "linear_start": True}
    section |= {"first_stage": str(folder / "first.ckpt"), "text_encoder": str(text_model)} | training
    return new_task(UPSCALER, training_config(section), None)


def test_an_upscaler_starts_from_the_small_image(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the text encoder of another model, and its loss is low at once."""
    task = upscaler(tmp_path, text_model)
    expected = torch.load(text_model)
    for name, weight in task.model.cond_stage_model.state_dict().items():
        assert torch.equal(weight, expected[f"cond_stage_model.{name}"])
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, (64, 64), mode="bilinear")
    batch = images(8) | {"image": smooth}
    task.start(batch)
    seen = []
    apply_model = LatentDiffusion.apply_model

    def apply(self: LatentDiffusion, x: Tensor, t: Tensor, cond: dict) -> Tensor:
        seen.append((x, cond))
        return apply_model(self, x, t, cond)

    monkeypatch.setattr(LatentDiffusion, "apply_model", apply)
    loss = task.training_step(batch)
    ((x, cond),) = seen
    assert x.shape == (8, 4, 16, 16)
    assert cond["c_concat"][0].shape == (8, 3, 16, 16)
    assert cond["c_adm"].shape == (8,)
    loss.backward()
    assert loss < 1.5
    labels = task.unet.label_emb.weight
    near, far = ((labels[20] - labels[k]).square().mean() for k in (21, 300))
    assert near < far / 10, "neighbouring noise levels begin alike"
    constant = task.unet.out[2].weight.grad[:, 6:8]
    assert constant.abs().max() == 0, "the constant channels are not learned from"


def test_a_decoder_is_trained_alone() -> None:
    section = TRAINING | {"linear_start": True, "decoder_only": True, "latent_noise": 0.1}
    task = new_task(FIRST_STAGE_X4, training_config(section), None)
    before = {name: weight.clone() for name, weight in task.model.named_parameters()}
    task.training_step(images(4)).backward()
    torch.optim.AdamW(task.trained().values(), lr=1e-3).step()
    changed = {name.split(".")[0] for name, w in task.model.named_parameters() if not w.equal(before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_loss_of_a_first_stage_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the decoder gives 0, the error is the image. That of a constant one is the same at any scale."""
    config = training_config(TRAINING | {"kl_weight": 0.0})
    task = FirstStageTask(instantiate_from_config(FIRST_STAGE), config)
    monkeypatch.setattr(task.model, "decode", lambda z: torch.zeros(len(z), 3, 32, 32))
    batch = images(2)
    batch["image"] = torch.tensor([0.5, -0.2])[:, None, None, None].expand(2, 3, 32, 32)
    torch.testing.assert_close(task.losses(batch), torch.tensor([4 * (0.5 + 0.25), 4 * (0.2 + 0.04)]))
    assert task.figures["psnr"].item() == pytest.approx((12.041 + 20.0) / 2, rel=1e-3)


def test_a_depth_estimators_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    task = DepthTask(instantiate_from_config(ESTIMATOR), training_config(TRAINING | {"depth_scale": 4.0}))
    monkeypatch.setattr(task.model, "forward", lambda x: torch.ones(len(x), 1, 32, 32))
    losses = task.losses(images(2, depth=torch.tensor([0.5, 1.0])[:, None, None, None].expand(2, 1, 32, 32)))
    torch.testing.assert_close(losses, torch.tensor([1.0, 3.0]))
    with pytest.raises(InputError, match="data: its examples have no depth maps"):
        task.losses(images(2))


def test_samples_have_the_prompts_of_the_config() -> None:
    task = task_of(sample_prompts=["a red cube", "a blue ball", "a cone"], sample_steps=2)
    assert task.sample_grid(batch_of(2)).shape == (34 + 2, 3 * 34 + 2, 3)
    captions = task_of(sample_steps=2).sample_grid(batch_of(2))
    assert captions.shape == (34 + 2, 2 * 34 + 2, 3)


def test_samples_of_a_sibling_use_the_examples_masks(text_model: Path) -> None:
    task = sibling(INPAINTING, text_model, sample_prompts=["a", "b", "c"], sample_steps=2)
    batch = images(2, mask=torch.ones(2, 1, 32, 32))
    assert task.sample_grid(batch).shape == (34 + 2, 2 * 34 + 2, 3), "as many as there are masks"


def test_few_images_make_a_grid_of_two_rows() -> None:
    task = FirstStageTask(instantiate_from_config(FIRST_STAGE), training_config(TRAINING))
    assert task.sample_grid(images(3)).shape == (2 * 34 + 2, 3 * 34 + 2, 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_file_of_a_model_is_not_held_beside_what_is_trained(tmp_path: Path) -> None:
    """The pages of the file stayed: 3.4 GB of v1's UNet, which is copied before it is trained."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2048, 2048)}, path)
    layer = nn.Linear(2048, 2048, bias=False)
    layer.weight.data = read_state_dict(path)["weight"]
    assert layer.weight.sum() == 2048**2

    def resident() -> int:
        """kB of the file's pages in this process."""
        entries = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(entry.split("Rss:")[1].split()[0]) for entry in entries)

    before = resident()
    Task(layer, training_config(TRAINING))
    assert before > 8_000
    assert resident() < 1_000
    assert (layer.weight == 1).all()


@pytest.mark.parametrize("config", [INPAINTING, DEPTH], ids=["inpainting", "depth"])
@torch.no_grad()
def test_images_are_encoded_in_single_precision(config: dict) -> None:
    """In bf16 they were off by more than the posterior's standard deviation, unlike cached latents."""
    task, batch = task_of(config), images(mask=(torch.rand(2, 1, 32, 32) > 0.5).float())
    mean, std = task.posterior(batch)
    concat = task.concat(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = task.model.encode_first_stage(batch["image"]).mean
        again, further = task.posterior(batch), task.concat(batch)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], std)
    assert torch.equal(further, concat)


def test_a_model_of_fewer_timesteps_is_trained() -> None:
    """Without validation it was refused for the default of validation_timesteps, which were not named."""
    few = {**SECOND_STAGE, "params": {**SECOND_STAGE["params"], "timesteps": 100}}
    assert task_of(few).losses(batch_of()).isfinite().all()
    with pytest.raises(InputError, match=r"training: validation_timesteps: 900 is none of the .* 0 … 99"):
        task_of(few, validation_every=1)


def test_dropout_of_a_part_that_is_trained_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """It was never applied, and nothing said so."""
    params = SECOND_STAGE["params"]
    unet = {**params["unet_config"], "params": {**params["unet_config"]["params"], "dropout": 0.1}}
    task_of({**SECOND_STAGE, "params": {**params, "unet_config": unet}})
    ddconfig = {**FIRST_STAGE["params"]["ddconfig"], "dropout": 0.25}
    first = {**FIRST_STAGE, "params": {**FIRST_STAGE["params"], "ddconfig": ddconfig}}
    FirstStageTask(instantiate_from_config(first), training_config(TRAINING))
    task_of({**SECOND_STAGE, "params": {**params, "first_stage_config": first}})  # which is not trained
    assert [line.partition(" in its config")[0] for line in caplog.messages] == [
        "model: the UNet has dropout 0.1",
        "model: the encoder has dropout 0.25",
        "model: the decoder has dropout 0.25",
    ]


@pytest.mark.parametrize("config", [FIRST_STAGE, ESTIMATOR], ids=["first stage", "depth estimator"])
def test_keys_that_other_models_have_are_named(config: dict, caplog: pytest.LogCaptureFixture) -> None:
    """They were ignored without a word."""
    new_task(config, training_config(TRAINING), None)
    assert not caplog.records
    new_task(config, training_config(TRAINING | {"compile": True, "min_snr_gamma": 5.0}), None)
    (line,) = [record.message for record in caplog.records]
    name = config["target"].rpartition(".")[2]
    assert line == f"training: compile, min_snr_gamma without effect: a {name} is no diffusion model"
