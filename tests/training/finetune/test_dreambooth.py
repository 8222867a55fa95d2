import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_finetuning import DATA, batch, config, model_and_pipeline, their_loss

from ldm.errors import InputError
from ldm.training.finetune import dreambooth as dreambooth_module
from ldm.training.finetune.dreambooth import (
    DreamBoothLoraTask,
    DreamBoothTask,
    class_captions,
    make_class_images,
)
from ldm.training.finetune.methods import DreamBooth
from ldm.training.objective import draw_timesteps
from ldm.weights.diffusers_names import unet_to_ours


def dreambooth(model: torch.nn.Module, cls: type = DreamBoothTask, **options: object) -> DreamBoothTask:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    prompts = ["a red cube", "a blue cube", "a cube"]
    return cls(model, config(), DATA, images=images, class_prompts=prompts, prior_weight=0.7, **options)


def test_a_step_is_that_of_diffusers_script() -> None:
    """Loss of the instances plus weight x loss of the class, and the UNet after one step of AdamW."""
    model, pipeline = model_and_pipeline("v1")
    task = dreambooth(model)
    pipeline.unet.requires_grad_(True)
    x = batch()
    prior = task.class_batch(x)
    losses = []
    for each in (x, prior):
        t = draw_timesteps(task.config, each["step"], each["row"])
        noise = task.noise(each, (4, 8, 8))
        losses.append(their_loss(pipeline, task.latents(each), noise, t, task.embed(each["caption"])))
    expected = losses[0] + 0.7 * losses[1]
    found = task.training_step(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    unet = model.model.diffusion_model
    for loss, network in ((found, unet), (expected, pipeline.unet)):
        loss.backward()
        torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-4).step()
    theirs = unet_to_ours(pipeline.unet.state_dict())
    for name, weight in unet.named_parameters():
        torch.testing.assert_close(weight.detach(), theirs[name], rtol=1e-5, atol=1e-5)


def test_examples_of_the_class_have_random_numbers_of_their_own() -> None:
    task = dreambooth(model_and_pipeline("v1")[0])
    x = batch()
    prior = task.class_batch(x)
    assert prior["mean"].shape == x["mean"].shape
    latents = task.class_latents()[0]
    for mean, caption in zip(prior["mean"], prior["caption"], strict=True):  # each image has its own
        (index,) = (k for k in range(3) if torch.equal(latents[k], mean))
        assert caption == task.class_prompts[index]
    assert not torch.equal(task.noise(x, (4, 8, 8)), task.noise(prior, (4, 8, 8)))
    again = task.class_batch(x)
    assert torch.equal(prior["mean"], again["mean"])
    seen = [task.class_batch({**x, "step": step})["mean"] for step in range(12)]
    assert len({each[0, 0, 0, 0].item() for each in seen}) == 3  # all images are used


def test_without_a_class_it_is_plain_training() -> None:
    model, _ = model_and_pipeline("v1")
    found = DreamBoothTask(model, config(), DATA).training_step(batch())
    with_prior = dreambooth(model).training_step(batch())
    assert 0 < found < with_prior


def test_as_a_lora_only_that_is_trained() -> None:
    model, _ = model_and_pipeline("v1")
    task = dreambooth(model, DreamBoothLoraTask, rank=2)
    task.training_step(batch()).backward()
    assert all(weight.grad is not None for weight in task.trained().values())
    assert all("lora" in name for name in task.trained())


def test_other_families_have_no_class_images() -> None:
    model, _ = model_and_pipeline("v1-inpainting")
    with pytest.raises(InputError, match="LatentInpaintDiffusion"):
        dreambooth(model)


class Painter:
    """Stands for a pipeline: paints what it is asked for in the colour of the seed."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def generate(self, requests: list) -> object:
        for request in requests:
            self.asked.append((request.prompt, request.seed))
            yield type("Made", (), {"pixels": np.full((8, 8, 3), request.seed, np.uint8)})


def test_class_images_are_made_once_and_missing_ones_again(tmp_path: Path) -> None:
    painter = Painter()

    def make(prompt: str = "a cube", count: int = 5, model: str = "m") -> list[Path]:
        return make_class_images(lambda: painter, prompt, count, tmp_path, 10, model)

    paths = make()
    assert painter.asked == [("a cube", 10 + k) for k in range(5)]
    assert [int(np.asarray(Image.open(path))[0, 0, 0]) for path in paths] == [10, 11, 12, 13, 14]
    assert make() == paths
    assert len(painter.asked) == 5
    paths[3].unlink()
    make(count=6)
    assert painter.asked[5:] == [("a cube", 13), ("a cube", 15)]
    assert paths[3].with_suffix(".txt").read_text() == "a cube\n"
    assert make("a cone")[0].parent != paths[0].parent  # another prompt, another model
    assert make(model="other")[0].parent != paths[0].parent


def test_class_images_of_another_model_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model went by the path and the size of its file, which fine-tuning it leaves as they are."""
    asked = []

    def make(*args: object) -> list[Path]:
        asked.append(args[-1])
        raise InputError("enough")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dreambooth_module, "make_class_images", make)
    files, config = SimpleNamespace(weights=tmp_path / "model.safetensors"), SimpleNamespace(seed=0)
    setup = SimpleNamespace(files=files, weights=None, fabric=None, folder=tmp_path, config=config)
    for k, content in enumerate((b"one", b"two", b"one")):
        files.weights.write_bytes(content)
        os.utime(files.weights, ns=(k, k))
        with pytest.raises(InputError, match="enough"):
            dreambooth_module.class_images(setup, DreamBooth(class_prompt="a vase"))
    assert asked[0] == asked[2] != asked[1]


def test_of_a_prompt_with_choices_each_image_has_an_expansion(tmp_path: Path) -> None:
    painter = Painter()
    prompt = "a {red|blue} cube{| on a table}"
    paths = make_class_images(lambda: painter, prompt, 20, tmp_path, 10, "m")
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    assert set(captions) == {f"a {c} cube{t}" for c in ("red", "blue") for t in ("", " on a table")}
    assert painter.asked == [(caption, 10 + k) for k, caption in enumerate(captions)]
    assert captions == class_captions(prompt, 30, 10)[:20] != class_captions(prompt, 20, 11)


@pytest.mark.parametrize("prompt", ["a {red|blue cube", "a __colour__ cube"])
def test_choices_that_cannot_be_read(prompt: str) -> None:
    with pytest.raises(InputError, match=r"--class_prompt: .*character"):
        class_captions(prompt, 1, 0)
