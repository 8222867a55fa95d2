"""Two passes: equal to the commands one after the other, in any batch, recorded, taken up again, refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import Result, refused
from PIL import Image
from tiny_sampling import normal, relative_difference

from ldm.errors import FieldError, InputError
from ldm.images.pixels import to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline.infotext import a1111_parameters, image_texts, parse_a1111
from ldm.pipeline.passes import enlarged_images, enlarged_latents, enlarged_pixels, second_seed
from ldm.pipeline.pixel_upscaler import PixelUpscaler
from ldm.sampling import Denoiser, ImageNoise, ImageSeeds, sample

Load = Callable[..., Pipeline]
Command = Callable[..., Result]


def one(**values: object) -> ImageRequest:
    return ImageRequest(**{"prompt": "a cat", "steps": 4, "seed": 1, "scale": 3.0, "hires": 2.0} | values)


def alone(request: ImageRequest) -> ImageRequest:
    """The first pass by itself."""
    return request.twin(hires=None, hires_strength=None, hires_steps=None, hires_upscaler=None)


def pixels(pipeline: Pipeline, *requests: ImageRequest) -> list[np.ndarray]:
    return [image.pixels for image in pipeline.generate(requests)]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: four steps, one image of 16x16 pixels, no watermark."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 4, "--n_samples", 1, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none", "--device", "cpu"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.fixture
def esrgan(tmp_path: Path) -> Path:
    architectures = pytest.importorskip("spandrel.architectures.ESRGAN")
    torch.manual_seed(0)
    network = architectures.ESRGAN(num_filters=8, num_blocks=1, scale=4)
    torch.save(network.state_dict(), tmp_path / "4x-tiny.pth")
    return tmp_path / "4x-tiny.pth"


# Equal to the commands by hand


def by_hand(pipeline: Pipeline, request: ImageRequest, image: Image.Image) -> np.ndarray:
    """Image to image over an enlarged first pass, with the noise of the second one."""
    seeds = {
        name: second_seed(seed)
        for name in ("seed", "variation_seed", "start_seed")
        if (seed := getattr(request, name)) is not None
    }
    second = alone(request).twin(
        **seeds,
        height=image.height,
        width=image.width,
        steps=request.hires_steps or request.steps,
        init_img=image,
        strength=request.hires_strength,
    )
    return pixels(pipeline, second)[0]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"hires_strength": 0.9, "hires_steps": 7, "hires": 1.4},
        {"sampler": "ddim", "eta": 1.0, "variation_seed": 8, "variation_strength": 0.3},
        {"sampler": "dpmpp_sde", "fixed_code": True, "start_seed": 3},
        {"height": 24, "width": 40, "hires_strength": 1.0},
        {"hires_strength": 0.0},
    ],
)
def test_it_is_text_to_image_then_image_to_image(load: Load, values: dict[str, object]) -> None:
    pipeline, request = load(), one(hires_upscaler="lanczos", **values)
    (first,) = pixels(pipeline, alone(request))
    (found,) = pixels(pipeline, request)
    height, width = (round(request.hires * side / 8) * 8 for side in first.shape[:2])
    assert found.shape == (height, width, 3)
    larger = Image.fromarray(first).resize((width, height), Image.Resampling.LANCZOS)
    assert np.array_equal(found, by_hand(pipeline, request, larger))
    assert pipeline.image_size(pipeline.resolve(request)) == (height, width)


def test_latents_are_enlarged_bilinearly(load: Load) -> None:
    pipeline, request = load(), one(sampler="euler_ancestral", hires=1.5)
    model, device = pipeline.model, torch.device("cpu")
    cond, uncond = (model.get_learned_conditioning([text]) for text in ("a cat", ""))
    discretization, whole = pipeline.trajectory(request)
    _, tail = pipeline.trajectory(request.twin(strength=0.5))
    denoiser = Denoiser(model, cond, uncond, 3.0, discretization=discretization)
    with torch.inference_mode():
        noise = ImageNoise([ImageSeeds(1)], (4, 2, 2), device)
        first = sample(denoiser, request.sampler, whole, noise)
        start = F.interpolate(first, size=(3, 3), mode="bilinear", align_corners=False, antialias=False)
        noise = ImageNoise([ImageSeeds(second_seed(1))], (4, 3, 3), device)
        latents = sample(denoiser, request.sampler, tail, noise, init=start)
        expected = to_uint8(model.decode_first_stage(latents))[0]
    assert np.array_equal(pixels(pipeline, request)[0], expected)


def test_a_pixel_upscaler_enlarges(load: Load, esrgan: Path) -> None:
    pipeline, request = load(), one(hires=1.5, hires_upscaler=str(esrgan))
    (first,) = pixels(pipeline, alone(request))
    larger = PixelUpscaler(esrgan, safety="off").enlarged(first)
    assert larger.shape == (64, 64, 3)
    fitted = Image.fromarray(larger).resize((24, 24), Image.Resampling.LANCZOS)
    (found,) = pixels(pipeline, request)
    assert np.array_equal(found, by_hand(pipeline, request, fitted))
    assert not np.array_equal(found, pixels(pipeline, request.twin(hires_upscaler="lanczos"))[0])


def test_a_pixel_upscaler_that_has_changed_is_read_again(load: Load, esrgan: Path, tmp_path: Path) -> None:
    """A service went on with the old network, and recorded the new file's hash."""
    own = tmp_path / "own.pth"
    shutil.copy(esrgan, own)
    pipeline, request = load(), one(hires=1.5, hires_upscaler=str(own))
    before = pipeline.pixel_upscalers.of(request)
    assert pipeline.pixel_upscalers.of(request) is before
    os.utime(own, ns=(1, 1))
    assert pipeline.pixel_upscalers.of(request) is not before


def test_the_bundled_model_keeps_the_layout() -> None:
    """Of the first pass, which is the image that it draws without a second one."""
    pipeline = Pipeline.load(safety="off")
    request = ImageRequest(
        "a green cone on top of a yellow cylinder",
        seed=5,
        steps=10,
        hires=2,
        hires_strength=0.2,
        hires_upscaler="lanczos",
    )
    (large,), (small,) = pixels(pipeline, request), pixels(pipeline, alone(request))
    enlarged = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.LANCZOS))
    assert large.shape == (256, 256, 3)
    assert np.abs(large.astype(float) - enlarged).mean() < 10


# In any batch, on any memory


@pytest.mark.parametrize(
    ("sampler", "upscaler"),
    [
        ("euler_ancestral", "latent"),
        ("dpmpp_sde", "lanczos"),
        pytest.param("dpm_adaptive", "latent", marks=pytest.mark.slow),
    ],
)
def test_an_image_alone_is_the_image_of_a_batch(load: Load, sampler: str, upscaler: str) -> None:
    requests = [
        one(prompt=prompt, seed=seed, sampler=sampler, hires_upscaler=upscaler, hires_strength=0.75)
        for seed, prompt in enumerate(("a cat", "a dog", "a cat"))
    ]
    pipeline = load(batch_size=3)
    for request, together in zip(requests, pixels(pipeline, *requests), strict=True):
        assert np.abs(pixels(pipeline, request)[0].astype(int) - together).max() <= 1


def test_the_second_pass_does_not_depend_on_how_much_the_first_one_drew(load: Load) -> None:
    """At full strength all that is left of the first pass is its seed."""
    pipeline = load()
    few, many = (
        pixels(pipeline, one(sampler="euler_ancestral", steps=steps, hires_steps=3, hires_strength=1.0))[0]
        for steps in (2, 5)
    )
    assert np.array_equal(few, many)


def test_a_second_pass_that_does_not_fit_is_made_in_halves(load: Load, monkeypatch, caplog) -> None:
    requests = [one(seed=seed) for seed in range(2)]
    expected = pixels(load(batch_size=2), *requests)
    plain, taken = LatentDiffusion.apply_model, []

    def limited(self, x, *rest):
        if len(x) > 2 and x.shape[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, x, *rest)

    monkeypatch.setattr(LatentDiffusion, "apply_model", limited)
    found = [image.pixels for image in load(batch_size=2).generate(requests, taken.append)]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(found, expected, strict=True))
    assert caplog.messages == ["out of memory with 2 images of 32x32 at once: going on with 1"]
    assert sum(taken) == 2 * (4 + 2)


def test_a_second_pass_without_a_guided_step_is_refused_at_once(load: Load) -> None:
    """The first pass was sampled before, and in a prompt file the run ended there, each time anew."""
    pipeline, part = load(), {"guidance_start": 0.6, "guidance_end": 0.9}
    pipeline.resolve(one(steps=10, hires_strength=0.4, **part))
    with pytest.raises(InputError, match=r"none of the 2 steps is within guidance_start 0\.6"):
        pipeline.resolve(one(steps=10, hires_strength=0.2, **part))
    with pytest.raises(InputError, match="none of the 1 steps"):
        pipeline.resolve(one(steps=1, hires_strength=1.0, **part))
    with pytest.raises(InputError, match="none of the 1 steps"):  # of which its range counts in parts, too
        pipeline.resolve(one(steps=1, hires=None, sampler="dpm_adaptive", **part))
    (image,) = pipeline.generate([one(steps=1, hires=None, scale=1.0, **part)])  # which guides nothing
    assert image.pixels is not None


@pytest.mark.parametrize(("own", "named"), [({}, "steps"), ({"hires_steps": 1000}, "hires_steps")])
def test_levels_too_near_name_the_steps_that_were_given(load: Load, own: dict, named: str) -> None:
    """It named --steps, also where --hires_steps decided how near the levels of the second pass are."""
    pipeline = load()
    given = {"sampler": "dpmpp_sde", "schedule": "polyexponential", "rho": 5, "hires_strength": 1.0}
    with pytest.raises(FieldError, match=rf"take fewer {named} or a rho nearer to 1$"):
        pipeline.resolve(one(steps=4 if own else 1000, **given, **own))


def test_a_batch_is_tried_with_its_second_pass(load: Load, monkeypatch) -> None:
    sizes, plain = [], LatentDiffusion.decode_first_stage
    monkeypatch.setattr(
        LatentDiffusion, "decode_first_stage", lambda self, z: sizes.append(z.shape[-1]) or plain(self, z)
    )
    pipeline = load(batch_size="auto")
    pipeline.fitting_batch([pipeline.resolve(one(hires=3))], 1)
    assert set(sizes) == {6}


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_nan_in_the_first_pass_stays_nan(load: Load, monkeypatch, upscaler: str) -> None:
    plain = LatentDiffusion.apply_model

    def one_lost(self, x, *rest):
        out = plain(self, x, *rest)
        out[1::2] = torch.nan if x.shape[-1] == 2 else out[1::2]
        return out

    monkeypatch.setattr(LatentDiffusion, "apply_model", one_lost)
    good, lost = pixels(load(batch_size=2), *(one(seed=k, hires_upscaler=upscaler) for k in range(2)))
    assert good is not None
    assert lost is None


# Seamless ones


@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)])
def test_what_is_seamless_is_enlarged_around_its_edges(dims: tuple[int, ...]) -> None:
    x, size = normal(1, 4, 6, 8), (9, 12)
    image = (255 * torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(0))).byte().numpy()
    for dim in (2, 3):
        rolled = enlarged_latents(x.roll(2, dim), size, dims)
        same = relative_difference(rolled, enlarged_latents(x, size, dims).roll(3, dim)) < 1e-6
        assert same == (dim in dims)
        a = enlarged_pixels(np.roll(image, 2, dim - 2), size, dims)
        b = np.roll(enlarged_pixels(image, size, dims), 3, dim - 2)
        assert np.array_equal(a, b) == (dim in dims)


def test_an_image_that_is_lost_comes_as_nan() -> None:
    decoded = torch.zeros(2, 3, 8, 8)
    decoded[1, 0, 0, 0] = torch.nan
    good, lost = enlarged_images(decoded, (16, 24))
    assert good.shape == (16, 24, 3)
    assert lost.shape == (3, 16, 24)
    assert lost.isnan().all()


def test_all_of_it_together(load: Load) -> None:
    """A seamless panorama in two passes, alone and in a batch."""
    requests = [one(seed=k, tiling="both", panorama=True, width=32, steps=2) for k in range(2)]
    pipeline = load(batch_size=2)
    together = pixels(pipeline, *requests)
    assert together[0].shape == (32, 64, 3)
    assert np.abs(pixels(pipeline, requests[1])[0].astype(int) - together[1]).max() <= 1


# What is recorded


def test_an_image_is_made_again_from_its_file(txt2img: Command) -> None:
    argv = ["--hires", 1.5, "--hires_strength", 0.6, "--hires_steps", 5, "--tiling", "x", "--seed", 9]
    first = txt2img(*argv)
    assert first.code == 0
    assert "the second pass runs 3 of 5 steps" in first.err
    assert first.images[0].shape == (24, 24, 3)
    (settings,) = first.settings
    assert (settings["width"], settings["height"], settings["hires"], settings["tiling"]) == (
        16,
        16,
        1.5,
        "x",
    )
    again = txt2img("--like", first.paths[0], folder="again")
    assert np.array_equal(again.images[0], first.images[0])
    other = txt2img("--like", first.paths[0], "--tiling", "none", folder="other")
    assert not np.array_equal(other.images[0], first.images[0])
    text = Image.open(first.paths[0]).text["parameters"].splitlines()[-1]
    for field in ("Size: 16x16", "Denoising strength: 0.6", "Hires upscale: 1.5", "Hires steps: 5"):
        assert field in text
    assert "Hires upscaler: Latent" in text
    read = parse_a1111(Image.open(first.paths[0]).text["parameters"])
    names = ("hires", "hires_strength", "hires_steps", "hires_upscaler", "width", "height")
    assert [read[name] for name in names] == [1.5, 0.6, 5, "latent", 16, 16]
    assert "strength" not in read


def test_an_image_without_a_second_pass_has_none_of_its_settings(txt2img: Command) -> None:
    (settings,) = txt2img().settings
    assert not [name for name in settings if name.startswith("hires") or name in ("tiling", "panorama")]


def test_texts_of_the_web_ui() -> None:
    """Written by AUTOMATIC1111's web UI 1.10: a factor, or a size."""
    base = (
        "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.7, "
    )
    found = parse_a1111(base + "Hires upscale: 2, Hires upscaler: Lanczos")
    assert (found["hires"], found["hires_strength"], found["hires_upscaler"]) == (2.0, 0.7, "lanczos")
    sized = parse_a1111(base + "Hires resize: 768x768, Hires upscaler: 4x-UltraSharp")
    assert (sized["hires"], sized["hires_upscaler"]) == (1.5, "4x-UltraSharp")
    assert parse_a1111(base.rstrip(", "))["strength"] == 0.7


def test_the_upscaler_is_recorded_by_its_name(txt2img: Command, esrgan: Path) -> None:
    argv = ["--hires", 2, "--hires_upscaler", esrgan]
    first = txt2img(*argv)
    assert first.code == 0, first.err
    (settings,) = first.settings
    assert settings["hires_upscaler"] == "4x-tiny.pth"
    assert "Hires upscaler: 4x-tiny," in Image.open(first.paths[0]).text["parameters"]
    refused(txt2img("--like", first.paths[0], folder="lost"), "4x-tiny.pth", "--hires_upscaler")
    again = txt2img("--like", first.paths[0], "--hires_upscaler", esrgan, folder="again")
    assert np.array_equal(again.images[0], first.images[0])
    torch.save({name: 2 * t for name, t in torch.load(esrgan).items()}, esrgan)
    changed = txt2img(*argv, "--resume")
    assert changed.code == 2
    assert "hires upscaler" in changed.err[-1]


def test_a_run_is_taken_up_again(txt2img: Command) -> None:
    argv = ["--hires", 2, "--n_iter", 3, "--sampler", "euler_ancestral"]
    first = txt2img(*argv)
    before = first.images
    first.paths[1].unlink()
    again = txt2img(*argv, "--resume")
    assert again.code == 0
    assert all(map(np.array_equal, again.images, before))
    assert txt2img("--hires", 1.5, *argv[2:], "--resume").code == 2


def test_strength_of_an_init_image_goes_first_in_the_web_uis_text() -> None:
    settings = one(init_img="a.png", strength=0.3, height=16, width=16).settings()
    assert "Denoising strength: 0.3" in a1111_parameters(settings)
    assert (
        image_texts(one(hires_upscaler="/home/me/x.pth", height=16, width=16).settings())[1].count("me/") == 0
    )


# What cannot be


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hires": 1.0}, "hires 1: the second pass is for a larger image; give a factor above 1"),
        ({"hires": 0.5}, "hires: 0.5 is not a number in range: 1"),
        ({"hires": float("nan")}, "hires: nan is not a number in range"),
        ({"hires": 17}, "hires: 17"),
        ({"hires_strength": 1.5}, "hires_strength: 1.5"),
        ({"hires_steps": 0}, "hires_steps: 0"),
        ({"hires": None, "hires_strength": 0.5}, "hires_strength 0.5 without hires"),
        ({"hires": None, "hires_upscaler": "lanczos"}, "hires_upscaler lanczos without hires"),
        ({"hires_upscaler": ""}, "hires_upscaler is empty"),
        ({"rng": "compvis"}, "hires is for rng image"),
        ({"init_img": "a.png", "strength": 1, "mask": "b.png"}, "hires with mask"),
        ({"init_img": "a.png", "noise_level": 20}, "hires with noise_level"),
        ({"steps": None, "timesteps": (900, 500), "hires_steps": 3}, "hires_steps 3 with timesteps"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, object], words: str) -> None:
    with pytest.raises(FieldError) as error:
        one(**values)
    assert words in str(error.value)


def test_bad_lines_on_the_command_line(
    txt2img: Command, model: tuple[Path, Path], monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(Pipeline, "model", property(lambda self: pytest.fail("the model was loaded")))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for argv, words in (
        (["--hires", "1.0"], "--hires 1: the second pass is for a larger image"),
        (["--hires", "1.01"], "--hires 1.01: of 16x16 it makes 16x16 again"),
        (["--hires", "16", "--H", "8000"], "--hires 16: 256x128000 is beyond 65536"),
        (["--hires", "16", "--H", "4000", "--W", "4000"], "more than --max_pixels 64,000,000"),
        (["--hires", "two"], "argument --hires: two is not a number in range"),
        (["--hires", "2", "--hires_upscaler", "lanczoz"], "--hires_upscaler lanczoz: there is no such file"),
        (["--hires", "2", "--hires_upscaler", model[1]], "which is no pixel upscaler such as ESRGAN"),
        (["--hires", "2", "--hires_upscaler", tmp_path / "broken.pth"], "broken.pth"),
        (["--hires_steps", "3"], "--hires_steps 3 without --hires"),
    ):
        refused(txt2img(*argv), words)


def test_enlarging_an_image_has_no_second_pass(command: Command) -> None:
    result = command("upscale", "--init-img", "a.png", "--hires", 2)
    refused(result, "unrecognized arguments: --hires")


def test_a_second_pass_of_an_unreadable_network_names_the_option() -> None:
    with pytest.raises(InputError, match=r"^--model nowhere.pth: there is no such file"):
        PixelUpscaler("nowhere.pth")
