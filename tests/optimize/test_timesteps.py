"""Embeddings of timesteps that are computed once for a run: against the plain model, bit for bit."""

import torch
from tiny_sampling import Recorder, contexts, guided_latents, tiny_model
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.optimize.context import keep_context
from ldm.optimize.graph import graph_unet
from ldm.optimize.timesteps import LARGEST, MOST, keep_timesteps
from ldm.sampling.denoiser import timesteps

CPU = torch.device("cpu")


class Count:
    """How often the time embedding and the residual blocks' projections of it are computed."""

    def __init__(self, model: LatentDiffusion):
        self.embeddings = self.projections = 0
        unet = model.model.diffusion_model
        blocks = [block for block in unet.modules() if isinstance(block, ResBlock)]
        self.blocks = len(blocks)
        unet.time_embed[0].register_forward_hook(self.embedding)
        for block in blocks:
            block.emb_layers[1].register_forward_hook(self.projection)

    def embedding(self, *_) -> None:
        self.embeddings += 1

    def projection(self, *_) -> None:
        self.projections += 1


def output(model: LatentDiffusion, t: Tensor, images: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 4, 8, 8, generator=generator)
    return model.apply_model(x, t, torch.randn(images, 5, 32, generator=generator))


def test_timesteps_are_one_object_for_a_number() -> None:
    with torch.inference_mode():
        a = timesteps(3.5, 2, CPU)
    assert a.tolist() == [3.5, 3.5]
    assert a.dtype == torch.float32
    assert not a.is_inference()
    assert timesteps(3.5, 2, CPU) is a
    assert timesteps(3.5, 1, CPU).tolist() == [3.5]


def test_a_second_image_computes_none(model: LatentDiffusion) -> None:
    uncond, *conds = contexts(3)
    plain = guided_latents(model, conds, uncond)
    keep_timesteps(model)
    count = Count(model)
    first = guided_latents(model, conds[:1], uncond)
    assert (count.embeddings, count.projections) == (4, 4 * count.blocks)
    second = guided_latents(model, conds[1:], uncond)
    assert (count.embeddings, count.projections) == (4, 4 * count.blocks)
    assert all(torch.equal(a, b) for a, b in zip([*first, *second], plain, strict=True))


def test_recorded_steps_read_what_is_kept(model: LatentDiffusion) -> None:
    """As the command puts them together: one recording serves every timestep and prompt."""
    uncond, *conds = contexts(4)
    plain = guided_latents(model, conds, uncond)
    recorder = Recorder()
    runner = graph_unet(model, recorder)
    keep_context(model)
    keep_timesteps(model)
    count = Count(model)
    kept = guided_latents(model, conds, uncond)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert recorder.captured == len(runner.entries) == 2  # with guidance and without
    assert (count.embeddings, count.projections) == (4, 4 * count.blocks)


def test_batches_and_precisions_take_turns(model: LatentDiffusion) -> None:
    runs = [(1, 500.0), (2, 500.0), (1, 20.0), (2, 500.0), (1, 500.0)]

    def outputs() -> list[Tensor]:
        made = []
        with torch.inference_mode():
            for images, t in runs:
                made.append(output(model, timesteps(t, images, CPU), images))
                for dtype in (torch.bfloat16, torch.float16):  # kept ones did not depend on the dtype once
                    with torch.autocast("cpu", dtype=dtype):
                        made.append(output(model, timesteps(t, images, CPU), images))
        return made

    plain = outputs()
    keep_timesteps(model)
    kept = outputs()
    assert [a.dtype for a in kept] == [a.dtype for a in plain]
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


def test_timesteps_that_differ_within_a_batch(model: LatentDiffusion) -> None:
    """They need not be those of a sampler."""
    with torch.inference_mode():
        steps = [torch.tensor([3.0, 700.0]), torch.tensor([700.0, 3.0]), torch.tensor([3.0, 700.0])]
        plain = [output(model, t, 2) for t in steps]
        keep_timesteps(model)
        assert all(torch.equal(output(model, t, 2), a) for t, a in zip(steps, plain, strict=True))


def test_many_timesteps_come_and_go(model: LatentDiffusion) -> None:
    """Freed objects leave their ids to others: what is kept must not be found under another's."""
    plain = tiny_model().model.diffusion_model
    unet = model.model.diffusion_model
    keep_timesteps(model)
    x, context = torch.ones(1, 4, 2, 2), torch.ones(1, 1, 32)
    with torch.no_grad():
        for i in range(MOST + 100):
            t = torch.tensor([float(i % 997)])
            result = unet(x, t, context)
            if i % 100 == 0 or i > MOST + 90:
                assert torch.equal(result, plain(x, t, context)), i
    assert len(unet.forward.__self__.kept) == MOST


def test_gradients_large_batches_and_class_labels_use_the_plain_layers(model: LatentDiffusion) -> None:
    count = Count(model)
    keep_timesteps(model)
    t = timesteps(3.0, 1, CPU)
    for _ in range(2):
        output(model, t)
    assert count.embeddings == 2  # with gradients
    with torch.inference_mode():
        for _ in range(2):
            output(model, timesteps(3.0, LARGEST + 1, CPU), LARGEST + 1)
    assert count.embeddings == 4

    labelled = UNetModel(4, 32, 4, 1, [1], [1], num_classes=5, num_heads=2, context_dim=32, num_groups=8)
    for parameter in labelled.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    inputs = torch.ones(1, 4, 8, 8), t, torch.ones(1, 5, 32)
    wrapped = nn.Module()
    wrapped.model = nn.Module()
    wrapped.model.diffusion_model = labelled
    with torch.inference_mode():
        plain = [labelled(*inputs, torch.tensor([y])) for y in (0, 4)]
        assert not torch.equal(*plain)
        keep_timesteps(wrapped)
        assert all(
            torch.equal(labelled(*inputs, torch.tensor([y])), a) for y, a in zip((0, 4), plain, strict=True)
        )
