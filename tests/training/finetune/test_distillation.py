import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_pipelines import outputs
from peft import LoraConfig
from tiny_finetuning import DATA, batch, config, model_and_pipeline
from torch import Tensor

from ldm.errors import InputError
from ldm.sampling.schedule import SCHEDULES, Discretization, lcm_timesteps, published
from ldm.training.finetune.distillation import DistillationTask
from ldm.training.objective import draw_timesteps

SCALE, RANK = 4.0, 3


def task_of(kind: str, sampler: str, **changes: Any) -> tuple[DistillationTask, Any]:
    """A task whose LoRA does something, and a pipeline of diffusers with the same networks."""
    model, pipeline = model_and_pipeline(kind)
    options = {"rank": RANK, "alpha": 5.0, "layers": "attention"}
    task = DistillationTask(model, config(**changes), DATA, sampler=sampler, scale=SCALE, **options)
    generator = torch.Generator().manual_seed(1)
    for name, weight in task.trained().items():
        if name.endswith(".up"):
            weight.data.normal_(std=0.1, generator=generator)
    return task, pipeline


def add_to_theirs(task: DistillationTask, unet: Any) -> list[tuple[Tensor, Tensor]]:
    """Let a UNet of diffusers have the task's LoRA by peft; pairs of weights, theirs and ours."""
    parts = {task.model.lora.names[name]: part for name, part in task.model.lora.parts.items()}
    modules = [name.removeprefix("unet.") for name in parts]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=5, target_modules=modules))
    pairs = []
    for name, part in parts.items():
        layer = unet.get_submodule(name.removeprefix("unet."))
        for side, own in (("A", part.down), ("B", part.up)):
            weight = getattr(layer, f"lora_{side}")["default"].weight
            weight.data.copy_(own.detach())
            pairs.append((weight, own))
    return pairs


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize("kind", ["v1", "v2-v", "inpainting"])
def test_loss_and_gradient_by_the_networks_of_diffusers_peft_and_ddim(kind: str, sampler: str) -> None:
    task, pipeline = task_of(kind, sampler)
    unet, x = pipeline.unet, batch()
    generator = torch.Generator().manual_seed(7)
    if kind == "inpainting":
        x["concat"] = torch.randn(2, 5, 8, 8, generator=generator)
    x0, noise = task.latents(x), task.noise(x, (4, 8, 8))
    text, empty = (task.embed(list(texts)).detach() for texts in (x["caption"], ["", ""]))
    found = task.losses(x)
    found.mean().backward()
    pairs = add_to_theirs(task, unet)
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True, clip_sample=False)
    ddim.set_timesteps(50)

    def step(sample: Tensor, t: int, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """One level below, x0 and the noise, of example k, by diffusers."""
        seen = torch.cat([sample, x["concat"][k : k + 1]], 1) if "concat" in x else sample
        plain, guided = (unet(seen, t, cond[k : k + 1], return_dict=False)[0] for cond in (empty, text))
        result = ddim.step(plain + scale * (guided - plain), t, sample, eta=0.0)
        alpha, clean = ddim.alphas_cumprod[t], result.pred_original_sample
        return result.prev_sample, clean, (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    def at(clean: Tensor, noise: Tensor, end: int) -> Tensor:
        return clean if end < 0 else ddim.add_noise(clean, noise, torch.tensor([end]))

    expected = []
    t = draw_timesteps(task.config, x["step"], x["row"])
    levels = (level.tolist() for level in task.levels(t, task.uniform(x, "end")))
    for k, (level, below, end) in enumerate(zip(*levels, strict=True)):
        assert below > 0
        start = ddim.add_noise(x0[k : k + 1], noise[k : k + 1], torch.tensor([level]))
        with torch.no_grad():
            unet.disable_adapters()
            lower = step(start, level, k, SCALE)[0]
            unet.enable_adapters()
            target = at(*step(lower, below, k, 1.0)[1:], end)
        difference = at(*step(start, level, k, 1.0)[1:], end) - target
        expected.append(((difference**2 + 1e-6).sqrt() - 1e-3).mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.stack(expected).mean().backward()
    for theirs, own in pairs:
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize("count", [1000, 1010, 50])
def test_levels_are_those_that_the_sampler_visits(sampler: str, count: int) -> None:
    task, _ = task_of("v1", sampler)
    task.taught = torch.tensor([-1, *lcm_timesteps(count)])
    task.model.betas = torch.zeros(count)
    discretization = published() if count == 1000 else Discretization(torch.linspace(0.999, 0.01, count))
    share = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level, below, end = task.levels(torch.arange(count), share)
    visited = np.unique(level.numpy())
    assert len(visited) == 50
    sigmas = discretization.sigma(visited[::-1].astype(float))
    np.testing.assert_allclose(sigmas, SCHEDULES["lcm"](discretization, 50)[:-1], rtol=1e-6)
    assert bool(((level - torch.arange(count)).abs() <= count // 50).all())
    assert sorted(set(below.tolist())) == [-1, *visited[:-1]]
    assert bool(((end >= -1) & (end <= below)).all())
    assert bool((end == -1).all()) == (sampler == "lcm")


def test_below_the_lowest_level_is_the_image_that_the_teacher_sees() -> None:
    """There is no noise: the model is not asked what it sees there."""
    task, _ = task_of("v1", "lcm")
    asked, predict = [], task.predict
    task.predict = lambda x, t, cond: asked.append(predict(x, t, cond)) or asked[-1]
    loss = task.losses_at(batch(), torch.zeros(2, dtype=torch.long), torch.zeros(2), ["a zqx cube"] * 2)
    guided = asked[0] + SCALE * (asked[1] - asked[0])  # without a text, and with one
    expected = (((asked[-1] - guided) ** 2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_validation_takes_as_many_examples_as_there_are() -> None:
    """Their numbers were taken for places in a batch of training: the timesteps went past the last one."""
    task, _ = task_of("v1", "tcd", validation_timesteps=[100, 999])
    x = batch() | {"step": -1}
    first, again, later = (task.validation_losses(x | {"row": x["row"] + k}) for k in (0, 0, 500))
    assert torch.equal(first, again)
    assert bool(torch.isfinite(later).all())


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_lora_that_is_left_out_changes_no_bit(kind: str) -> None:
    model, _ = model_and_pipeline(kind)
    plain = outputs(copy.deepcopy(model), kind)
    task = DistillationTask(model, config(), DATA, rank=RANK, layers="all", text_encoder=True)
    for part in task.model.lora.parts.values():
        part.up.data.fill_(0.1)
    with task.model.lora.left_out():
        without = outputs(model, kind)
    beside = outputs(model, kind)
    for name in ("text", "unet"):
        assert torch.equal(without[name], plain[name])
        assert not torch.equal(beside[name], plain[name])


def test_a_model_of_too_few_timesteps_is_refused() -> None:
    model, _ = model_and_pipeline("v1")
    model.betas = torch.zeros(40)
    with pytest.raises(InputError, match="this one has 40"):
        DistillationTask(model, config(), DATA)


@pytest.mark.parametrize(("scale", "asked"), [(1.0, ["text"]), (0.0, ["empty"]), (4.0, ["empty", "text"])])
def test_the_teacher_is_asked_only_what_is_used(scale: float, asked: list[str]) -> None:
    """At the scales 1 and 0 it was asked with and without the text, and one of them was left out again."""
    task, _ = task_of("v1", "tcd")
    task.scale = scale
    x, found, contexts = batch(), [], []
    text, predict = task.embed(x["caption"]), task.predict

    def observed(sample: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        contexts.append(cond)
        part = next(iter(task.model.lora.parts.values()))
        if not part.on:
            found.append("text" if torch.allclose(cond, text, atol=1e-4) else "empty")
        return predict(sample, t, cond)

    task.predict = observed
    task.losses(x)
    assert found == asked
    assert {cond.stride() for cond in contexts} == {text.stride()}, "torch.compile has one UNet for all"


def test_the_sampler_is_part_of_what_has_to_agree_in_a_resumed_run() -> None:
    """It was left out for a while, and checkpoints that have it could not go on."""
    task, _ = task_of("v1", "lcm")
    assert (task.identity()["sampler"], task.identity()["scale"]) == ("lcm", "4")
