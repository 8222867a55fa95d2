"""ControlNets in a pipeline: diffusers' images, batches, ranges, what they see; and the settings' checks."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_pipelines import tiny_config, tiny_pipeline
from PIL import Image
from tiny_control import tiny_controlnet, write_controlnet

from ldm.errors import FieldError, InputError
from ldm.images.edges import canny
from ldm.images.pixels import to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import Control, ImageRequest, Pipeline
from ldm.pipeline import pipeline as engine
from ldm.pipeline.control import ControlledModel, Moved
from ldm.pipeline.infotext import image_texts
from ldm.pipeline.panorama import windowed
from ldm.pipeline.seams import padded_around
from ldm.pipeline.settings.control import parse_control
from ldm.weights.controlnet import load_controlnet

Load = Callable[..., Pipeline]
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a v1 model of diffusers, its config and two ControlNets for it."""
    folder = tmp_path_factory.mktemp("control")
    tiny_pipeline("v1").save_pretrained(folder / "v1")
    (folder / "v1.yaml").write_text(json.dumps({"model": tiny_config("v1")}))
    write_controlnet(folder / "edges.pth")
    write_controlnet(folder / "lines.safetensors", seed=1)
    for k in range(3):
        drawing(k).save(folder / f"drawing{k}.png")
    return folder


@pytest.fixture
def pipeline(load: Load, files: Path) -> Pipeline:
    return load(files / "v1.yaml", files / "v1")


def drawing(seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 2, (height // 8, width // 8, 3), np.uint8) * 255
    return Image.fromarray(values.repeat(8, 0).repeat(8, 1))


def one(*control: str | Control, **values: Any) -> ImageRequest:
    base = {"prompt": "a cat", "steps": 3, "seed": 1, "scale": 3.0, **SIZE}
    return ImageRequest(**base | {"control": control} | values)


def images(pipeline: Pipeline, *requests: ImageRequest, batch_size: int = 1) -> list[np.ndarray]:
    pipeline.options = replace(pipeline.options, batch_size=batch_size)
    return [image.pixels for image in pipeline.generate(requests)]


# diffusers' images


def theirs(
    nets: list[Any], start: torch.Tensor, drawings: list[Image.Image], **arguments: Any
) -> torch.Tensor:
    """An image of StableDiffusionControlNetPipeline, [1, 3, H, W] in 0 … 1, from start latents."""
    import diffusers

    base = tiny_pipeline("v1")
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **{name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        controlnet=nets[0] if len(nets) == 1 else nets,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures = drawings[0] if len(nets) == 1 else drawings
    return pipeline(
        "a cat", image=pictures, latents=start, num_inference_steps=10, output_type="pt", **arguments
    ).images


@pytest.mark.parametrize(
    ("weights", "starts", "ends", "scale"),
    [([1.0], [0.0], [1.0], 5.0), ([0.7], [0.2], [0.6], 5.0), ([1.0, 0.5], [0.0, 0.3], [0.5, 1.0], 1.0)],
)
def test_ten_steps_are_diffusers(
    pipeline: Pipeline,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: list[float],
    starts: list[float],
    ends: list[float],
    scale: float,
) -> None:
    """One and two ControlNets that act at a part of the steps, with and without guidance."""
    decoded, first = [], []
    calls = pipeline.model.apply_model
    monkeypatch.setattr(
        pipeline.model, "apply_model", lambda x, *rest: first.append(x[:1].clone()) or calls(x, *rest)
    )
    monkeypatch.setattr(engine, "to_uint8", lambda x: decoded.append(x) or to_uint8(x))
    names = ["edges.pth", "lines.safetensors"][: len(weights)]
    control = [
        f"{files / name}:{files / f'drawing{k}.png'}:{weights[k]}:{starts[k]}-{ends[k]}"
        for k, name in enumerate(names)
    ]
    list(pipeline.generate([one(*control, steps=10, scale=scale)]))
    nets = [tiny_controlnet("v1"), tiny_controlnet("v1", 1)][: len(weights)]
    several = len(nets) > 1
    expected = theirs(
        nets,
        first[0],
        [drawing(k) for k in range(len(nets))],
        guidance_scale=scale,
        controlnet_conditioning_scale=weights if several else weights[0],
        control_guidance_start=starts if several else starts[0],
        control_guidance_end=ends if several else ends[0],
    )
    torch.testing.assert_close(((decoded[0] + 1) / 2).clamp(0, 1), expected, atol=1e-3, rtol=0)
    plain = images(pipeline, one(steps=10, scale=scale))[0]
    assert np.abs(plain - to_uint8(decoded[0])[0].astype(int)).max() > 4


# Batches and weights


def test_a_weight_of_0_is_none(pipeline: Pipeline, files: Path) -> None:
    control = f"{files / 'edges.pth'}:{files / 'drawing0.png'}:0"
    plain, without, with_ = images(
        pipeline, one(), one(control), one(control.removesuffix("0") + "1"), batch_size=1
    )
    assert np.array_equal(plain, without)
    assert not np.array_equal(plain, with_)


@pytest.mark.parametrize("options", [{}, {"eager": False}])
def test_an_image_alone_is_that_of_a_batch(load: Load, files: Path, options: dict[str, Any]) -> None:
    """Control images, preprocessors and scales may differ in a batch; the plain path, and what is fast."""
    pipeline = load(files / "v1.yaml", files / "v1", **options)
    requests = [
        one(
            f"{files / 'edges.pth'}:{files / f'drawing{k}.png'}:0.8:0-0.7",
            f"{files / 'lines.safetensors'}:{files / 'drawing0.png'}",
            control_preprocess=[how, "none"],
            seed=k,
            scale=2.0 + k,
        )
        for k, how in enumerate(["none", "invert", "canny"])
    ]
    assert len({request.batch_key() for request in requests}) == 1
    alone, together = images(pipeline, *requests), images(pipeline, *requests, batch_size=3)
    for single, other in zip(alone, together, strict=True):
        assert np.abs(single.astype(int) - other).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[1]).max() > 4


def test_what_a_batch_must_share(files: Path) -> None:
    net, other, image = files / "edges.pth", files / "lines.safetensors", files / "drawing0.png"
    keys = {
        one(text).batch_key()
        for text in (f"{net}:{image}", f"{other}:{image}", f"{net}:{image}:0.5", f"{net}:{image}:1:0-0.5")
    }
    assert len(keys) == 4


def test_the_fast_path_is_the_plain_one_to_rounding(load: Load, files: Path) -> None:
    request = one(f"{files / 'edges.pth'}:{files / 'drawing0.png'}")
    fast, plain = (
        images(load(files / "v1.yaml", files / "v1", eager=eager), request)[0] for eager in (False, True)
    )
    assert np.abs(fast.astype(int) - plain).max() <= 1


def test_the_network_is_read_once(pipeline: Pipeline, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.pipeline import control

    read: list[str] = []
    monkeypatch.setattr(
        control, "load_controlnet", lambda path, *rest: read.append(path) or load_controlnet(path, *rest)
    )
    for k in range(2):
        images(pipeline, one(f"{files / 'edges.pth'}:{files / f'drawing{k}.png'}"))
    assert read == [str(files / "edges.pth")]


def test_many_at_once_are_read_once(
    pipeline: Pipeline, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pushed each other out within one image."""
    from ldm.pipeline import control

    read: list[str] = []
    monkeypatch.setattr(
        control, "load_controlnet", lambda path, *rest: read.append(path) or load_controlnet(path, *rest)
    )
    nets = [tmp_path / f"{k}.pth" for k in range(control.MOST + 1)]
    for net in nets:
        shutil.copy(files / "edges.pth", net)
    images(pipeline, one(*[f"{net}:{files / 'drawing0.png'}" for net in nets]))
    assert read == list(map(str, nets))


def test_image_to_image_and_inpainting(pipeline: Pipeline, files: Path) -> None:
    control = f"{files / 'edges.pth'}:{files / 'drawing1.png'}"
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    init = {"init_img": drawing(0), "strength": 0.0}  # no step, and nothing to follow
    assert np.array_equal(*images(pipeline, one(**init), one(control, **init)))
    for values in ({"strength": 0.7}, {"strength": 1.0, "mask": mask, "mask_blur": 0}):
        init = {"init_img": drawing(0), **values}
        plain, with_ = images(pipeline, one(**init), one(control, **init))
        assert np.abs(plain.astype(int) - with_).max() > 4
        if "mask" in values:
            assert np.array_equal(plain[:, 32:], with_[:, 32:])


def test_a_crop_to_the_mask_sees_its_part_of_the_control_image(pipeline: Pipeline, files: Path) -> None:
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 64))
    request = one(
        Control(str(files / "edges.pth"), drawing(2, 128, 128)),
        init_img=drawing(0, 128, 128),
        strength=1.0,
        mask=mask,
        crop_to_mask=0,
        mask_blur=0,
    )
    (image,) = pipeline.generate([request])
    (seen,) = image.controls
    assert np.array_equal(seen, np.asarray(drawing(2, 128, 128))[:64, 64:])


def test_an_inpainting_model(load: Load, tmp_path: Path) -> None:
    """Its ControlNet is that of the plain model: it is given the latents alone."""
    tiny_pipeline("v1-inpainting").save_pretrained(tmp_path / "model")
    (tmp_path / "model.yaml").write_text(json.dumps({"model": tiny_config("v1-inpainting")}))
    net = write_controlnet(tmp_path / "net.pth")
    pipeline = load(tmp_path / "model.yaml", tmp_path / "model")
    plain, with_ = images(pipeline, one(), one(Control(str(net), drawing())))
    assert np.abs(plain.astype(int) - with_).max() > 4


# What a ControlNet sees


def test_what_it_sees(pipeline: Pipeline, files: Path) -> None:
    net, source = str(files / "edges.pth"), drawing(0, 64, 128)
    requests = {
        "none": one(Control(net, source)),
        "invert": one(Control(net, source), control_preprocess="invert"),
        "canny": one(Control(net, source), control_preprocess="canny", canny_thresholds=(50, 150)),
        "crop": one(Control(net, source), control_resize="crop"),
        "pad": one(Control(net, source), control_resize="pad"),
    }
    seen = {
        name: image.controls[0]
        for name, image in zip(requests, pipeline.generate(requests.values()), strict=True)
    }
    fitted = np.asarray(source.resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(seen["none"], fitted)
    assert np.array_equal(seen["invert"], 255 - fitted)
    assert np.array_equal(seen["canny"], canny(fitted, 50, 150))
    assert np.array_equal(seen["crop"], np.asarray(source)[:, 32:96])
    assert not seen["pad"][:15].any()
    assert seen["pad"][20:40].any()


def test_depth_needs_its_estimator(pipeline: Pipeline, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model's is for the bundled models."""
    monkeypatch.setattr("ldm.weights.loading.LINKED", str(files / "nothing"))
    with pytest.raises(FieldError, match="v2 depth checkpoint: link it"):
        pipeline.resolve(one(f"{files / 'edges.pth'}:{files / 'drawing0.png'}", control_preprocess="depth"))


def test_a_pil_image_is_a_file_s(pipeline: Pipeline, files: Path) -> None:
    by_name = one(f"{files / 'edges.pth'}:{files / 'drawing0.png'}:0.5")
    given = one(Control(str(files / "edges.pth"), drawing(0), 0.5))
    assert np.array_equal(*images(pipeline, by_name, given))
    assert given.settings()["control"] == (f"{files / 'edges.pth'}:image:0.5",)


def test_weights_that_move(files: Path) -> None:
    """As with --low_vram max, the result is the same."""
    net = load_controlnet(files / "edges.pth", tiny_config("v1"), torch.float32)
    x, t, context, image = (
        torch.ones(1, 4, 8, 8),
        torch.tensor([9]),
        torch.ones(1, 77, 32),
        torch.ones(1, 3, 64, 64),
    )
    with torch.inference_mode():
        features = net.embed(image)
        expected = net(x, t, context, features)
        moved = Moved(net, torch.device("cpu"))
        assert torch.equal(moved.embed(image), features)
        for mine, other in zip(moved(x, t, context, features), expected, strict=True):
            assert torch.equal(mine, other)


def test_recorded_calls_are_left_aside(
    pipeline: Pipeline, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph would replay a call that adds nothing: only steps without a ControlNet are replayed."""
    request = one(f"{files / 'edges.pth'}:{files / 'drawing0.png'}:1:0-0.5", steps=4)
    expected = images(pipeline, request)[0]
    replayed: list[float] = []

    def replay(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        replayed.append(t[0].item())
        return LatentDiffusion.apply_model(pipeline.model, x, t, cond)

    monkeypatch.setattr(pipeline.model, "apply_model", replay)
    monkeypatch.setattr(pipeline.model, "recordings", object(), raising=False)
    assert np.array_equal(images(pipeline, request)[0], expected)
    assert replayed == [251.0, 1.0]


# Settings


def test_the_parts_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_control("net.pth:a.png") == Control("net.pth", "a.png")
    assert parse_control("net.pth:a.png:0.5") == Control("net.pth", "a.png", 0.5)
    assert parse_control("net.pth:a.png::0.2-0.8") == Control("net.pth", "a.png", 1.0, 0.2, 0.8)
    assert parse_control("folder/net:a.png:-1.5:0-1") == Control("folder/net", "a.png", -1.5)
    assert parse_control("C:\\nets\\net.pth:D:\\a.png:1") == Control("C:\\nets\\net.pth", "D:\\a.png")
    for name in ("10:30 net", "at 9:15.png", "9:0.5"):
        (tmp_path / name).write_bytes(b"")
    assert parse_control("10:30 net:at 9:15.png:2") == Control("10:30 net", "at 9:15.png", 2.0)
    assert parse_control("10:30 net:9:0.5") == Control("10:30 net", "9:0.5")
    for text in ("net.pth:a.png", "net.pth:a.png:0.5", "n.pth:a.png:1:0.25-1", "n.pth:a.png:0.123456789"):
        assert str(parse_control(text)) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"control": "net.pth"}, "'net.pth': give FILE:IMAGE"),
        ({"control": "net.pth:"}, "give FILE:IMAGE"),
        ({"control": "net.pth:a.png:1:0-1:5"}, "give FILE:IMAGE"),
        ({"control": "net.pth:a.png:much"}, "'much' is no weight, which is a number from -10 to 10"),
        ({"control": "net.pth:a.png:nan"}, "'nan' is no weight"),
        ({"control": "net.pth:a.png:11"}, "'11' is no weight"),
        ({"control": "net.pth:a.png:1:0.8-0.2"}, "'0.8-0.2' is no range of the steps"),
        ({"control": "net.pth:a.png:1:half"}, "'half' is no range of the steps"),
        ({"control": "net.pth:a.png:1:0-1.5"}, "'0-1.5' is no range"),
        ({"control": (3,)}, "control is an object of type int"),
        ({"control_preprocess": "canny"}, "control_preprocess without control"),
        ({"control": "n.pth:a.png", "control_preprocess": "edges"}, "invalid choice: 'edges'"),
        ({"control": "n.pth:a.png", "control_preprocess": ["none", "canny"]}, "given 2 times and control 1"),
        ({"control": "n.pth:a.png", "canny_thresholds": (1, 2)}, "without control_preprocess canny"),
        (
            {"control": "n.pth:a.png", "control_preprocess": "canny", "canny_thresholds": (5, 2)},
            "canny_thresholds 5,2: LOW, 5, is above HIGH, 2",  # asked for two numbers, which it had
        ),
        (
            {"control": "n.pth:a.png", "control_preprocess": "canny", "canny_thresholds": (5,)},
            "canny_thresholds 5: give two numbers LOW,HIGH",
        ),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ImageRequest("a cat", **values)
    assert message in str(error.value)


def test_settings_are_as_before_without_one() -> None:
    names = ("control", "control_preprocess", "control_resize", "canny_thresholds")
    assert not set(names) & ImageRequest("a cat").settings().keys()


def test_texts_in_an_image_have_names_alone() -> None:
    request = one("/home/me/canny.pth:/tmp/a.png:0.5:0-0.8", control_preprocess="canny")
    parameters, own = image_texts(request.settings())
    assert json.loads(own)["control"] == ["canny.pth:a.png:0.5:0-0.8"]
    facts = "Module: canny, Model: canny, Weight: 0.5, Guidance Start: 0, Guidance End: 0.8"
    assert f'ControlNet 0: "{facts}"' in parameters
    assert "/home" not in parameters + own


def test_what_controls_exclude(load: Load, files: Path) -> None:
    request = one(f"{files / 'edges.pth'}:{files / 'drawing0.png'}")
    for options, words in (({"deepcache": 2}, "deepcache 2"), ({"compile": True, "eager": False}, "compile")):
        pipeline = load(files / "v1.yaml", files / "v1", eager=True, deepcache=options.get("deepcache", 1))
        pipeline.options = replace(pipeline.options, **options)
        with pytest.raises(FieldError, match=words):
            pipeline.resolve(request)


def test_steps_without_any(pipeline: Pipeline, files: Path) -> None:
    with pytest.raises(FieldError, match=r"none of the 3 steps is within 0\.4-0\.5"):
        pipeline.resolve(one(f"{files / 'edges.pth'}:{files / 'drawing0.png'}:1:0.4-0.5"))


# With other ways to sample


@torch.inference_mode()
def test_a_panorama_cuts_what_it_follows(pipeline: Pipeline, files: Path) -> None:
    """A change of the control image reaches the windows that see it, and no others."""
    net = load_controlnet(files / "edges.pth", tiny_config("v1"), torch.float32)
    controlled = ControlledModel(pipeline.model, [net], [1.0], [(-math.inf, math.inf)])
    model = windowed(controlled, 8, (8, 24), ())
    x, image, context = torch.ones(1, 4, 8, 24), torch.zeros(1, 3, 64, 192), torch.ones(1, 77, 32)
    found = []
    for brightness in (0.0, 1.0):
        image[..., :16] = brightness
        cond = {"c_crossattn": [context], "c_control": [net.embed(image)]}
        found.append(model.apply_model(x, torch.tensor([9]), cond))
    assert (found[0] - found[1])[..., :4].abs().max() > 1e-5
    assert torch.equal(found[0][..., 16:], found[1][..., 16:])


def test_two_passes_fit_the_control_image_twice(pipeline: Pipeline, files: Path) -> None:
    request = one(Control(str(files / "edges.pth"), drawing(0)), hires=2.0)
    (image,) = pipeline.generate([request])
    assert image.pixels.shape == (128, 128, 3)
    assert image.controls[0].shape == (128, 128, 3)


def test_a_seamless_image_follows_around_its_edges(pipeline: Pipeline, files: Path) -> None:
    """Latents, control image and result may be rolled together, here by half the width."""
    found: list[torch.Tensor] = []
    net = load_controlnet(files / "edges.pth", tiny_config("v1"), torch.float32)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    context, t = torch.ones(1, 77, 32), torch.tensor([9])
    with torch.inference_mode(), padded_around([(net, (3,))]):
        for shift in (0, 4):
            features = net.embed(image.roll(8 * shift, 3))
            found.append(net(x.roll(shift, 3), t, context, features)[0].roll(-shift, 3))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_control_images_are_read_before_their_batch(
    pipeline: Pipeline, files: Path, reads_ahead: Callable, tmp_path: Path
) -> None:
    """In both sizes of an image of two passes."""
    drawing(0).save(tmp_path / "drawing.png")
    control = Control(str(files / "edges.pth"), str(tmp_path / "drawing.png"))
    reads_ahead(pipeline, one(control, hires=2.0), tmp_path / "drawing.png")
