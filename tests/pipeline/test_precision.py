"""--precision and the modes that save memory or time, as the command applies them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from commands import Result, refused
from tiny_sampling import Recorder

from ldm.models.diffusion.ddpm import LatentDiffusion, like_weights
from ldm.pipeline.generate import decode
from ldm.runs import render

Command = Callable[..., Result]


@pytest.fixture
def bundled(command: Command) -> Command:
    """Run the command on the bundled model: twenty steps, two pictures."""
    base = ["--prompt", "a red cube on top of a blue sphere", "--steps", 20, "--n_samples", 2, "--n_iter", 1]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9)))


@pytest.mark.parametrize(("precision", "floor"), [("half", 38), ("bf16", 22), ("autocast", 90)])
def test_lower_precision_is_near_full(bundled: Command, precision: str, floor: float) -> None:
    full = bundled(folder="full")
    result = bundled("--precision", precision)
    assert result.code == 0
    for image, exact in zip(result.images, full.images, strict=True):
        assert psnr(image, exact) > floor
    assert {s["precision"] for s in result.settings} == {precision}
    assert {s["precision"] for s in full.settings} == {"full"}


def test_half_is_the_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.cli.parser import txt2img_parser

    args = txt2img_parser().parse([])
    for device, precision in (("cpu", "full"), ("cuda", "half"), ("mps", "full")):
        monkeypatch.setattr(render, "choose_device", lambda name, device=device: torch.device(device))
        assert render.precision_of(args) == precision
    assert render.precision_of(txt2img_parser().parse(["--precision", "bf16"])) == "bf16"


def test_sampling_is_in_single_precision_over_weights_of_half() -> None:
    x = torch.ones(2, dtype=torch.float32)
    half = torch.nn.Linear(2, 2).half()
    assert like_weights(x, half).dtype == torch.float16
    told = like_weights({"c_crossattn": [x], "c_adm": torch.tensor([1])}, half)
    assert (told["c_crossattn"][0].dtype, told["c_adm"].dtype) == (torch.float16, torch.int64)


def test_a_decoder_that_yields_nan_decodes_in_float32(bundled: Command, monkeypatch) -> None:
    """And stays there; the pictures are those of a full decoder, and none is reported as NaN."""
    plain, calls = LatentDiffusion.decode_first_stage, []

    def overflowing(self, latents):
        images = plain(self, latents)
        calls.append(images.dtype)
        return images if images.dtype == torch.float32 else images * float("nan")

    expected = bundled("--precision", "bf16", folder="expected")
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", overflowing)
    result = bundled("--precision", "bf16", "--n_iter", 2)
    assert calls == [torch.bfloat16, torch.float32, torch.float32]
    assert result.code == 0
    told = "the autoencoder yields NaN in low precision: it decodes in float32 from here on"
    assert result.err.count(told) == 1
    assert psnr(result.images[0], expected.images[0]) > 35


def test_nan_latents_are_not_decoded_twice() -> None:
    class Model:
        device, calls = torch.device("cpu"), 0

        def decode_first_stage(self, latents: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return latents.half()

    model = Model()
    assert decode(model, torch.full((1, 1, 2, 2), float("nan"))).isnan().all()
    assert model.calls == 1


@pytest.mark.parametrize(
    ("argv", "key", "floor"),
    [
        ("--deepcache 2", "deepcache", 30),
        ("--tome 0.5", "tome", 28),
        ("--attention_slicing", None, 60),
        ("--low_vram max", None, 90),
    ],
)
def test_modes_are_applied_and_named(bundled: Command, argv: str, key: str | None, floor: float) -> None:
    exact = bundled(folder="exact")
    result = bundled(*argv.split())
    assert result.code == 0
    for image, other in zip(result.images, exact.images, strict=True):
        assert psnr(image, other) > floor
        assert np.array_equal(image, other) == (floor == 90 or key is None)
    told = result.settings[0].keys() - exact.settings[0].keys()
    assert told == ({key} if key else set())
    if key is None:
        assert any(line.startswith("peak memory of the process: ") for line in result.err)
    else:
        again = bundled("--like", result.paths[0], folder="again")
        assert psnr(again.images[0], result.images[0]) > 45


def test_eager_is_the_reference_and_the_default_is_near_it(bundled: Command) -> None:
    result, eager = bundled(), bundled("--eager", folder="eager")
    assert eager.code == 0
    for image, other in zip(result.images, eager.images, strict=True):
        assert psnr(image, other) > 60


def test_compiling_is_for_gpus(bundled: Command) -> None:
    result = bundled("--compile", "--steps", 2)
    assert result.code == 0
    assert "--compile: on a CPU it is no faster than what is done without it" in result.err


def test_what_a_gpu_does_unasked_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps recorded, keys and values kept: as `load` applies them, with a recorder that runs on a CPU."""
    from ldm.cli.parser import txt2img_parser
    from ldm.optimize import graph
    from ldm.pipeline.generate import Settings, generate
    from ldm.sampling.batches import plan
    from ldm.weights.loading import BUNDLED_CONFIG, BUNDLED_WEIGHTS, ROOT, load_model, read_config

    recorder = Recorder()
    monkeypatch.setattr(graph, "CudaCapture", lambda device: recorder)

    def pictures(model: LatentDiffusion) -> list[np.ndarray]:
        batches = plan(["a red cube", "a blue sphere", "a green cone"], 2, 2)
        settings = Settings(height=64, width=64, steps=5, guidance_end=0.8)
        return [image for _, images in generate(model, batches, settings) for image in images]

    model = load_model(read_config(ROOT / BUNDLED_CONFIG), ROOT / BUNDLED_WEIGHTS)
    plain = pictures(model)
    render.speed_up(model, txt2img_parser().parse([]), torch.device("cuda"))
    assert all(np.array_equal(a, b) for a, b in zip(pictures(model), plain, strict=True))
    assert (recorder.captured, recorder.replayed) == (3, 20)  # batches of 4, 2 and 1, four batches of 5 steps


def test_bad_values(bundled: Command) -> None:
    refused(bundled("--precision", "fp8"), "invalid choice: 'fp8'")
    refused(bundled("--tome", 0.9), "--tome: 0.9 is not a number in range: 0 … 0.75")
    refused(bundled("--deepcache", 0), "--deepcache: 0 is not a whole number in range")
    refused(bundled("--low_vram", "all"), "invalid choice: 'all'")
