"""Models that make images of images, by each contract."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_service import base64_png, live, pixels
from PIL import Image
from tiny_siblings import depth_section, upscaler_section, write_model

IMAGE = base64_png(Image.effect_noise((16, 16), 90).convert("RGB"))
MASK = base64_png(Image.new("L", (16, 16), 255))
SMALL = {"prompt": "a cat", "steps": 1}
GENERATE, OPENAI, SCORE = "/generate", "/v1/images/generations", "/score"
TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live(write_model(tmp_path_factory.mktemp("x4"), "x4", upscaler_section()), ("x4",)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live(write_model(tmp_path_factory.mktemp("depth"), "depth", depth_section()), ("depth",)) as (
        url,
        _,
    ):
        yield url


def ask(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=600)


def scored(**line: Any) -> dict[str, Any]:
    table = {"columns": list(line), "data": [list(line.values())], "parameters": {"num_inference_steps": 1}}
    return {"input_data": table}


@pytest.mark.parametrize(
    ("given", "ignored"), [({}, []), ({"denoising_strength": 0.4}, ["denoising_strength"])]
)
def test_img2img_enlarges(upscaler: str, given: dict[str, float], ignored: list[str]) -> None:
    """It was refused as without an init image, because a strength was always added."""
    answer = ask(upscaler, IMG2IMG, init_images=[IMAGE], **SMALL, **given)
    assert answer.status_code == 200, answer.text
    assert pixels(answer.json()["images"][0]).shape == (64, 64, 3)
    info = json.loads(answer.json()["info"])
    assert (info["ignored"], info["denoising_strength"]) == (ignored, None)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (GENERATE, SMALL, "this model enlarges images: give one as init_img"),
        (
            GENERATE,
            SMALL | {"init_img": IMAGE, "strength": 0.5},
            "strength: this model enlarges from pure noise",
        ),
        (GENERATE, SMALL | {"init_img": IMAGE, "mask": MASK}, "mask is not for this model, which enlarges"),
        (GENERATE, SMALL | {"init_img": IMAGE, "hires": 2}, "hires is not for this model, which enlarges"),
        (OPENAI, SMALL, "this model enlarges images: give one as init_img"),
        (SCORE, scored(prompt="a cat"), "this model enlarges images: give one as image"),
        (SCORE, scored(prompt="a cat", image=IMAGE, mask=MASK), "data[0]: mask is not for this model"),
        (TXT2IMG, SMALL, "the model x4 starts from images: give them to img2img as init_images"),
        (
            IMG2IMG,
            SMALL | {"init_images": [IMAGE], "mask": MASK},
            "mask is not for this model, which enlarges",
        ),
    ],
)
def test_what_an_upscaler_does_not_make(upscaler: str, path: str, body: dict[str, Any], words: str) -> None:
    """Messages named a script, and a noise level that the service had added."""
    assert words in in_one_line(ask(upscaler, path, **body))


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (GENERATE, SMALL, "this model paints over a depth map: give init_img, or a map as depth"),
        (SCORE, scored(prompt="a cat"), "this model paints over a depth map: give image, or a map as depth"),
        (TXT2IMG, SMALL, "the model depth starts from images: give them to img2img as init_images"),
    ],
)
def test_a_depth_model_needs_an_image(depth: str, path: str, body: dict[str, Any], words: str) -> None:
    """The message named a script."""
    assert words in in_one_line(ask(depth, path, **body))


def in_one_line(answer: httpx.Response) -> str:
    """The message of an error in any of the contracts' forms."""
    assert answer.status_code == 422, answer.text
    assert ".py" not in answer.text
    found = answer.json()
    return found.get("message") or found.get("detail") or found["error"]["message"]
