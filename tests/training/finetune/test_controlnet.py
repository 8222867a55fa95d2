"""Training a ControlNet: diffusers' step on equal weights, what stays frozen, the files, and mistakes."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_pipelines import tiny_config, tiny_pipeline
from PIL import Image
from tiny_control import tiny_controlnet, write_controlnet
from tiny_training import INPAINTING, UPSCALER, family
from torch import nn

from ldm.errors import InputError
from ldm.images.edges import canny
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.controlnet import ControlNet
from ldm.training.config import TrainingConfig
from ldm.training.data.example import Example, InMemory, Source
from ldm.training.data.folder import ImageFolder
from ldm.training.data.sources import build_source
from ldm.training.finetune import controlnet
from ldm.training.finetune.controlnet import (
    ControlNetTask,
    check,
    check_controls,
    new_controlnet,
    read_controlnet,
    train_source,
    write_depths,
)
from ldm.training.finetune.methods import Control
from ldm.training.objective import draw_timesteps
from ldm.training.start import start_latent_diffusion
from ldm.util import instantiate_from_config
from ldm.weights.controlnet import check_controlnet, load_controlnet, to_theirs, write_diffusers
from ldm.weights.loading import BUNDLED_WEIGHTS, choose_model, find

SECTION = tiny_config("v1")
WIDE = family("LatentDiffusion", 4, unet={"channel_mult": [2, 3]}, conditioning_key="crossattn")
FEW_LEVELS = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {"first_stage_config": {"params": {"ddconfig": {"ch_mult": [1, 2]}}}},
}
STEP = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    """Our model with the weights of diffusers' tiny one; tests copy it."""
    folder = tmp_path_factory.mktemp("v1")
    tiny_pipeline("v1").save_pretrained(folder)
    return start_latent_diffusion(SECTION, settings(init=str(folder)))


def settings(**values: Any) -> TrainingConfig:
    base = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "prompt_dropout": 0.0}
    return TrainingConfig(**base | values)


def new_task(v1: LatentDiffusion, net: ControlNet | None = None, **values: Any) -> ControlNetTask:
    model = copy.deepcopy(v1)
    net = net or new_controlnet(model.model.diffusion_model, SECTION)
    return ControlNetTask(model, settings(**values), net=net, section=SECTION)


def awake(net: ControlNet) -> ControlNet:
    """The same with numbers in the place of zeros, so that all of it learns in the first step."""
    generator = torch.Generator().manual_seed(4)
    for weight in net.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.1, generator=generator)
    return net


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    control = torch.rand(2, 3, 64, 64, generator=generator).round()
    captions = ["a red cube", "two cones"]
    return {"step": 0, "row": torch.arange(2), "caption": captions, "image": image, "control": control}


def test_a_new_one_changes_nothing_and_learns(v1: LatentDiffusion) -> None:
    """Its copies are the UNet's own weights; the first gradient reaches the zero convolutions alone."""
    task = new_task(v1)
    net, unet = task.model.control_model, task.unet
    state = unet.state_dict()
    same = [name for name, t in net.state_dict().items() if name in state and torch.equal(t, state[name])]
    assert {name.split(".")[0] for name in same} == {"time_embed", "input_blocks", "middle_block"}
    assert len(same) == len([name for name in net.state_dict() if name in state])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        context = task.embed(["a", "b"])
        cond = task.conditioning(batch(), context)
        plain = type(task.model).apply_model(task.model, x, t, context)
        assert torch.equal(task.model.apply_model(x, t, cond), plain)
    task.training_step(batch()).backward()
    reached = {
        name for name, weight in net.named_parameters() if weight.grad is not None and weight.grad.any()
    }
    assert {name.split(".")[0] for name in reached} == {"zero_convs", "middle_block_out"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_diffusers_and_changes_nothing_else(
    v1: LatentDiffusion, tmp_path: Path, checkpointing: bool
) -> None:
    import diffusers

    task = new_task(v1, checkpointing=checkpointing)
    net = awake(task.model.control_model)
    write_diffusers(net.state_dict(), SECTION, tmp_path / "net")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")

    before = {name: t.clone() for name, t in task.model.state_dict().items()}
    trained = task.trained()
    optimizer = torch.optim.AdamW(trained.values(), **STEP)
    loss = task.training_step(batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()

    pipeline, given = tiny_pipeline("v1"), batch()
    dist = pipeline.vae.encode(given["image"]).latent_dist
    posterior = task.normal(given, dist.mean.shape[1:], "posterior")
    latents = (dist.mean + dist.std * posterior) * pipeline.vae.config.scaling_factor
    noise, t = task.noise(given, latents.shape[1:]), draw_timesteps(task.config, 0, given["row"])
    noisy = pipeline.scheduler.add_noise(latents, noise, t)
    ids = pipeline.tokenizer(
        given["caption"], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    context = pipeline.text_encoder(ids)[0]
    down, middle = theirs(
        noisy, t, encoder_hidden_states=context, controlnet_cond=given["control"], return_dict=False
    )
    predicted = pipeline.unet(
        noisy,
        t,
        encoder_hidden_states=context,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    their_loss = torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
    optimizer = torch.optim.AdamW(theirs.parameters(), **STEP)
    their_loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()

    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    stepped = to_theirs(net.state_dict())
    gradients = to_theirs({name: weight.grad for name, weight in net.named_parameters()})
    clear = 0  # where a gradient is no more than a rounding error, Adam's first step has a sign by chance
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=0, atol=1e-5, msg=name)
        is_clear = weight.grad.abs() > 1e-6
        clear += int(is_clear.sum())
        torch.testing.assert_close(stepped[name][is_clear], weight[is_clear], rtol=0, atol=1e-5, msg=name)
    assert clear > 0.9 * sum(weight.numel() for weight in theirs.parameters())
    after = task.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(trained)
    assert all(name.startswith("control_model.") for name in changed)


def test_the_files_open_here_and_in_diffusers(v1: LatentDiffusion, tmp_path: Path) -> None:
    import diffusers

    task = new_task(v1)
    net = awake(task.model.control_model).half().float()  # what half precision holds
    single, folder = task.export(tmp_path)
    for path in (single, folder):
        ours = load_controlnet(path, SECTION, torch.float32).state_dict()
        assert all(torch.equal(ours[name], t) for name, t in net.state_dict().items())
    theirs = diffusers.ControlNetModel.from_pretrained(folder)
    assert theirs.config.cross_attention_dim == 32
    published = tiny_controlnet("v1").config
    for name in ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups"):
        assert np.array_equal(theirs.config[name], published[name])
    x, t, given = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), batch()
    with torch.no_grad():
        context = task.embed(given["caption"])
        down, middle = theirs(x, t, context, given["control"], return_dict=False)
        added = net(x, t, context, net.embed(given["control"]))
    for mine, their in zip(added, [*down, middle], strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-5)


def test_of_what_diffusers_does_not_have_there_is_one_file(tmp_path: Path) -> None:
    """The miniature's first level is wider than its first convolution."""
    model = instantiate_from_config(WIDE)
    net = new_controlnet(model.model.diffusion_model, WIDE)
    (single,) = ControlNetTask(model, settings(), net=net, section=WIDE).export(tmp_path)
    assert list(tmp_path.iterdir()) == [single]
    check_controlnet(single, WIDE)


def test_training_goes_on_from_a_file(v1: LatentDiffusion, tmp_path: Path) -> None:
    net = read_controlnet(write_controlnet(tmp_path / "net.safetensors"), SECTION)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    task = new_task(v1, net)
    optimizer = torch.optim.SGD(task.trained().values(), lr=1.0)
    task.training_step(batch()).backward()
    optimizer.step()
    assert not any(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    again = read_controlnet(tmp_path / "net.safetensors", SECTION).state_dict()
    assert all(torch.equal(t, before[name]) for name, t in again.items()), "the file is not written to"


def test_of_an_inpainting_model_the_weights_of_latents_are_copied() -> None:
    model = instantiate_from_config(INPAINTING)
    net = new_controlnet(model.model.diffusion_model, INPAINTING)
    given = model.model.diffusion_model.state_dict()["input_blocks.0.0.weight"]
    assert torch.equal(net.state_dict()["input_blocks.0.0.weight"], given[:, :4])


def test_samples_follow_the_images_in_turn(v1: LatentDiffusion) -> None:
    task = new_task(v1, sample_prompts=("a", "b", "c"), sample_steps=2)
    awake(task.model.control_model)
    assert task.sample_grid(batch()).shape[2] == 3
    features = task.conditioning(batch(), task.embed(["a", "b", "c"]))["c_control"][0]
    assert torch.equal(features[2], features[0])
    assert not torch.equal(features[1], features[0])


def images_in(folder: Path, count: int = 2, side: int = 32) -> Path:
    """Images of 4x6 coloured squares, 3:2, in a new folder."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(count):
        squares = rng.integers(0, 256, (4, 6, 3), np.uint8)
        pixels = squares.repeat(side // 4, 0).repeat(side // 4, 1)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def source_of(folder: Path, size: int, **options: Any) -> Source:
    files = choose_model(None, BUNDLED_WEIGHTS)
    return build_source("train", train_source(str(folder), "a house", size, Control(**options), files))


def test_control_images_lie_beside_the_images(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "images")
    images_in(folder / "control")
    source = source_of(folder, 32)
    assert len(source) == 2
    assert source.caption(0) == "a house"
    assert source[0].maps["control"].shape == (32, 48, 3)
    check_controls(source)


def test_edges_are_drawn_at_the_size_of_the_training(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "images")
    source = source_of(folder, 16, preprocess="canny")
    example = source[1]
    assert source.size(1) == (16, 16)
    assert example.image.shape == (16, 16, 3)
    assert np.array_equal(example.maps["control"], canny(example.image))
    assert example.maps["control"].any()
    check_controls(source)
    assert source_of(folder, 32, preprocess="canny").fingerprint != source.fingerprint


class Slope(nn.Module):
    """Estimates that what is below is near."""

    image_size = 64

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        rows = self.one * torch.linspace(1, 2, image.shape[2])
        return rows[None, None, :, None].expand(len(image), 1, -1, image.shape[3])


def test_depths_are_estimated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = images_in(tmp_path / "images")
    files = choose_model(None, BUNDLED_WEIGHTS)
    given = train_source(str(folder), "a house", 32, Control(preprocess="depth"), files)
    depths = Path(given["params"]["maps"]["control"])
    assert depths.is_relative_to(tmp_path / "cache")
    estimator = Slope()
    for _ in range(2):
        write_depths(ImageFolder(str(folder), "a house"), estimator, depths, torch.device("cpu"))
        assert estimator.calls == 2
    source = build_source("train", given)
    check_controls(source)
    depth = source[0].maps["control"]
    assert depth[0].max() == 0
    assert depth[-1].min() == 255
    # Another estimator's depths were taken for those of this one.
    monkeypatch.setattr(controlnet, "estimator_of", lambda files: ({}, find(BUNDLED_WEIGHTS)))
    other = train_source(str(folder), "a house", 32, Control(preprocess="depth"), files)
    assert other != given


def test_no_control_images(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "images")
    with pytest.raises(InputError, match=r"has no control images: put them into .*control under the names"):
        source_of(folder, 32)
    with pytest.raises(InputError, match="0 has no control image"):
        check_controls(InMemory([Example("0", np.zeros((8, 8, 3), np.uint8), "a")]))


def test_control_images_of_another_size() -> None:
    image, control = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)
    with pytest.raises(InputError, match=r"the control image of a.png has 16x8 pixels and the image 8x8"):
        check_controls(InMemory([Example("a.png", image, "a", {"control": control})]))


def test_models_that_no_controlnet_is_for(v1: LatentDiffusion) -> None:
    for section, why in (
        (UPSCALER, "models that enlarge images"),
        (FEW_LEVELS, "the model's latents are at 1/2"),
    ):
        with pytest.raises(InputError, match=why):
            check(SimpleNamespace(section=section), Control())
    with pytest.raises(InputError, match="compile"):
        new_task(v1, compile=True)
