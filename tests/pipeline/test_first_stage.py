"""The autoencoder where low precision is not enough for it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from commands import Result
from PIL import Image
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.optimize.offload import PlainTransfer, offload
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline import pipeline as engine

Command = Callable[..., Result]
Load = Callable[..., Pipeline]


def colour(red: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), (red, 90, 255 - red), np.uint8))


FALLBACK = "the autoencoder yields NaN in low precision: it works in float32 from here on"


@pytest.fixture
def bundled(command: Command) -> Command:
    """Run the command on the bundled model: twenty steps, two images."""
    base = ["--prompt", "a red cube on top of a blue sphere", "--steps", 20, "--n_samples", 2, "--n_iter", 1]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)))


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[torch.dtype]]:
    """Makes a method of the first stage yield NaN but in float32; returns the types that it computed in."""

    def overflow(name: str) -> list[torch.dtype]:
        plain, found = getattr(LatentDiffusion, name), []

        def call(self, x: Tensor) -> object:
            result = plain(self, x)
            posterior = isinstance(result, DiagonalGaussianDistribution)
            tensor = result.mean if posterior else result
            found.append(tensor.dtype)
            if tensor.dtype != torch.float32:
                tensor = tensor * float("nan")
                return (
                    DiagonalGaussianDistribution(torch.cat([tensor, tensor], dim=1)) if posterior else tensor
                )
            return result

        monkeypatch.setattr(LatentDiffusion, name, call)
        return found

    return overflow


def test_a_decoder_that_yields_nan_decodes_in_float32(bundled: Command, overflowing) -> None:
    """And stays there; the images are those of a full decoder, and none is reported as NaN."""
    expected = bundled("--precision", "bf16", folder="expected")
    types = overflowing("decode_first_stage")
    result = bundled("--precision", "bf16", "--n_iter", 2)
    assert types == [torch.bfloat16, torch.float32, torch.float32]
    assert result.code == 0
    assert result.err.count(FALLBACK) == 1
    assert psnr(result.images[0], expected.images[0]) > 35


def test_an_encoder_that_yields_nan_encodes_in_float32(load: Load, overflowing, caplog) -> None:
    """Every image was lost: the fallback was the decoder's alone."""
    types = overflowing("encode_first_stage")
    requests = [ImageRequest(init_img=colour(90 * k), strength=0.5, steps=2, seed=k) for k in range(3)]
    images = list(load(precision="bf16", batch_size=1).generate(requests))
    assert types == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert [image.pixels is None for image in images] == [False] * 3
    assert caplog.text.count(FALLBACK) == 1


def test_one_nan_latent_does_not_turn_the_fallback_off(load: Load, overflowing, monkeypatch, caplog) -> None:
    """The whole batch was lost with it."""
    types = overflowing("decode_first_stage")
    plain = engine.sample

    def one_nan(**arguments: object) -> Tensor:
        latents = plain(**arguments).clone()
        latents[1] = float("nan")
        return latents

    monkeypatch.setattr(engine, "sample", one_nan)
    images = list(load(precision="bf16", batch_size=3).generate([ImageRequest("a", steps=1)] * 3))
    assert [image.pixels is None for image in images] == [False, True, False]
    assert types == [torch.bfloat16, torch.float32]
    assert caplog.text.count(FALLBACK) == 1


def test_nan_latents_alone_are_not_decoded_twice(load: Load, overflowing, monkeypatch, caplog) -> None:
    types = overflowing("decode_first_stage")
    monkeypatch.setattr(engine, "sample", lambda **_: torch.full((1, 4, 2, 2), torch.nan))
    (image,) = load(precision="bf16").generate([ImageRequest("a")])
    assert image.pixels is None
    assert types == [torch.bfloat16]
    assert FALLBACK not in caplog.text


@pytest.mark.parametrize("precision", ["half", "autocast"])
def test_the_fallback_stays_with_offloaded_weights(
    load: Load, overflowing, monkeypatch, caplog, precision
) -> None:
    """With --low_vram every batch was decoded twice, and the notice came again with each."""
    types = overflowing("decode_first_stage")
    pipeline = load(precision=precision, batch_size=1, kernels="torch")
    if precision == "autocast":  # which is for GPUs
        monkeypatch.setattr(Pipeline, "_autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    offload(pipeline.model, torch.device("cpu"), transfer=PlainTransfer())
    images = list(pipeline.generate([ImageRequest("a", steps=1)] * 3))
    low = torch.float16 if precision == "half" else torch.bfloat16
    assert types == [low, *[torch.float32] * 3]
    assert all(image.pixels is not None for image in images)
    assert caplog.text.count(FALLBACK) == 1
