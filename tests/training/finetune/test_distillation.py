import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_pipelines import outputs
from tiny_finetuning import DATA, batch, config, model_and_pipeline
from torch import Tensor

from ldm.sampling.schedule import SCHEDULES, published
from ldm.training.finetune.distillation import DistillationTask

SCALE = 4.0


def task_of(model: object, sampler: str, **options: object) -> DistillationTask:
    changes = options.pop("changes", {})
    return DistillationTask(
        model, config(**changes), DATA, sampler=sampler, scale=SCALE, rank=4, layers="all", **options
    )


def disturb(task: DistillationTask) -> None:
    """The LoRA does something: its second matrices are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in task.trained().items():
        if name.endswith(".up"):
            weight.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize("kind", ["v1", "v2-v"])
def test_the_loss_by_the_networks_and_the_ddim_of_diffusers(kind: str, sampler: str) -> None:
    """A new LoRA changes nothing, so that the plain network is teacher, target and student."""
    model, pipeline = model_and_pipeline(kind)
    task, x = task_of(model, sampler), batch()
    x0, noise = task.latents(x), task.noise(x, (4, 8, 8))
    text, empty = (task.embed(list(texts)).detach() for texts in (x["caption"], ["", ""]))
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True, clip_sample=False)
    ddim.set_timesteps(50)

    def step(sample: Tensor, t: int, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """One level below, x0 and the noise of it, by diffusers."""
        unet = lambda cond: pipeline.unet(sample, t, cond[k : k + 1], return_dict=False)[0]  # noqa: E731
        predicted = unet(empty) + scale * (unet(text) - unet(empty))
        found = ddim.step(predicted, t, sample, eta=0.0)
        alpha = ddim.alphas_cumprod[t]
        x0 = found.pred_original_sample
        return found.prev_sample, x0, (sample - alpha.sqrt() * x0) / (1 - alpha).sqrt()

    def at(x0: Tensor, noise: Tensor, end: int) -> Tensor:
        return x0 if end < 0 else ddim.add_noise(x0, noise, torch.tensor([end]))

    expected = []
    for k, (t, below, end) in enumerate(zip(*(level.tolist() for level in task.levels(x)), strict=True)):
        assert below > 0
        start = ddim.add_noise(x0[k : k + 1], noise[k : k + 1], torch.tensor([t]))
        lower = step(start, t, k, SCALE)[0]
        target, found = at(*step(lower, below, k, 1.0)[1:], end), at(*step(start, t, k, 1.0)[1:], end)
        expected.append((((found - target) ** 2 + 1e-6).sqrt() - 1e-3).mean())
    torch.testing.assert_close(task.losses(x), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_levels_are_those_that_the_sampler_visits(sampler: str) -> None:
    model, _ = model_and_pipeline("v1")
    task = task_of(model, sampler, changes={"batch_size": 50})
    draws = [
        torch.stack(task.levels({"step": step, "row": torch.arange(50)})) for step in range(4)
    ]  # [4, 50] each
    for t, below, end in draws:
        sigmas = published().sigma(t.flip(0).double().numpy())
        np.testing.assert_allclose(sigmas, SCHEDULES["lcm"](published(), 50)[:-1], rtol=1e-6)
        assert torch.equal(below, t - 20)
        assert bool(((end >= -1) & (end <= below)).all())
        assert bool((end == -1).all()) == (sampler == "lcm")


def test_at_the_lowest_level_the_end_is_the_models_own_image() -> None:
    """Below it there is no noise: the model is not asked what it sees there."""
    model, _ = model_and_pipeline("v1")
    task = task_of(model, "lcm")
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x0 + 1.0
    lowest, image = torch.full((2,), 19), torch.full((2,), -1)
    torch.testing.assert_close(task.move(x, x0, lowest, image), x0)
    low = {"step": 0, "row": torch.zeros(2, dtype=torch.long)} | {
        k: v for k, v in batch().items() if k in ("caption", "mean", "std")
    }
    task.levels = lambda _: (lowest, image, image)
    asked = []
    predict = task.predict
    task.predict = lambda x, t, cond: asked.append(predict(x, t, cond)) or asked[-1]
    loss = task.losses(low)
    guided = asked[0] + SCALE * (asked[1] - asked[0])  # without a text, and with one
    expected = (((asked[-1] - guided) ** 2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_lora_that_is_left_out_changes_no_bit(kind: str) -> None:
    model, _ = model_and_pipeline(kind)
    plain = outputs(copy.deepcopy(model), kind)
    task = task_of(model, "lcm", text_encoder=True)
    disturb(task)
    with task.model.lora.left_out():
        without = outputs(model, kind)
    beside = outputs(model, kind)
    for name in ("text", "unet"):
        assert torch.equal(without[name], plain[name])
        assert not torch.equal(beside[name], plain[name])
