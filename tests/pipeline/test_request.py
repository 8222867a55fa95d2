"""ImageRequest: what it takes, what it refuses by the name of a field, and what a batch of them shares."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.errors import FieldError
from ldm.fields import settings_of
from ldm.pipeline.request import IMAGE_SETTINGS, MAX_SEED, ImageRequest, image_name, image_seed

INIT = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"init_img": INIT}, "init_img without strength, the share of the steps to run, 0 … 1"),
        ({"init_img": "a.png"}, "init_img without strength"),
        ({"strength": 0.5}, "strength 0.5 without init_img"),
        ({"strength": 0}, "strength 0 without init_img"),
    ],
)
def test_an_init_image_and_its_strength_come_together(own: dict, message: str) -> None:
    """One without the other was a TypeError, or an image of half-denoised noise."""
    with pytest.raises(FieldError, match=f"^{message}"):
        ImageRequest(**own)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"steps": 0}, "steps: 0 is not a whole number in range: 1 … 1,000"),
        ({"steps": 2.5}, "steps: 2.5 is not a whole number in range"),
        ({"steps": True}, "steps: True is not a value for it"),
        ({"scale": float("nan")}, "scale: nan is not a number in range"),
        ({"scale": "much"}, "scale: much is not a number in range"),
        ({"seed": -1}, "seed: -1 is not a whole number in range"),
        ({"seed": MAX_SEED + 1}, f"seed: {MAX_SEED + 1} is not a whole number in range"),
        ({"prompt": None}, "prompt: None is no text"),
        ({"prompt": 7}, "prompt: 7 is no text"),
        ({"guidance_end": None}, "guidance_end: None is not a number in range"),
        ({"rng": "torch"}, r"rng: invalid choice: 'torch' \(choose from image, compvis\)"),
        ({"fixed_code": 1}, "fixed_code: 1 is not true or false"),
        ({"sampler": "eulr"}, "sampler eulr is not known"),
        ({"sampler": "plms", "eta": 0.5}, "eta 0.5: plms has no such option; it is one of ddim,"),
        ({"sampler": "euler", "s_tmin": 1}, "s_tmin without s_churn: euler adds no noise"),
        ({"sampler": "euler", "s_churn": 0, "s_tmin": 1}, "s_tmin without s_churn: euler adds no noise"),
        ({"sampler": "euler", "s_churn": 1, "s_tmin": 2, "s_tmax": 1}, "s_tmin 2 is above s_tmax 1"),
        ({"sampler": "DPM++ 2M Karras", "schedule": "exponential"}, "sampler implies the karras schedule"),
        ({"schedule": "karras", "timesteps": (9, 1)}, "schedule and timesteps all say which noise levels"),
        ({"timesteps": (1, 9)}, "timesteps: the list must fall, but 9 comes after 1"),
        ({"sigmas": (1,)}, "sigmas '1': at least 2 numbers are needed"),
        ({"sigmas": (9, 1), "sampler": "dpm_adaptive"}, "sigmas with dpm_adaptive: it chooses its own"),
        ({"steps": 50, "timesteps": (999, 500, 1)}, "steps 50, but timesteps makes 3 steps; give one"),
        ({"rho": 5}, "rho 5 is for schedule karras"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_start 0.5 is not below guidance_end 0.5"),
        ({"variation_seed": 1}, "variation_seed needs a variation_strength, too"),
        ({"variation_strength": 0.1}, "variation_strength needs a variation_seed, too"),
        (
            {"variation_seed": 1, "variation_strength": 0.1, "rng": "compvis"},
            "variation_seed is for rng image",
        ),
        ({"start_seed": 3}, "start_seed 3 is for fixed_code with rng image"),
    ],
)
def test_what_is_refused(own: dict, message: str) -> None:
    with pytest.raises(FieldError, match=f"^{message}"):
        ImageRequest(**own)


def test_values_come_into_their_types() -> None:
    request = ImageRequest(steps=20.0, scale=7, timesteps=None, seed="9")
    assert (request.steps, request.scale, request.seed) == (20, 7.0, 9)
    assert isinstance(request.steps, int)
    assert isinstance(request.scale, float)
    assert ImageRequest(timesteps="999, 500 1").timesteps == (999.0, 500.0, 1.0)
    assert ImageRequest(sampler="DPM++ 2M Karras").schedule == "karras"
    assert ImageRequest(sampler="Euler a").sampler == "euler_ancestral"


@pytest.mark.parametrize(
    "own", [{}, {"timesteps": (9, 1)}, {"zero_snr": True}, {"sampler": "DPM++ SDE Karras"}]
)
def test_a_request_may_be_made_again_from_itself(own: dict) -> None:
    request = ImageRequest(**own)
    assert replace(request) == request
    assert replace(request, seed=3).steps == request.steps


def test_steps_of_image_to_image() -> None:
    assert ImageRequest(init_img=INIT, strength=0.29, steps=100).steps_to_run == 29
    assert ImageRequest(init_img=INIT, strength=0, steps=100).steps_to_run == 0
    assert ImageRequest(steps=7).steps_to_run == 7
    assert ImageRequest(timesteps=(9, 5, 1)).steps_to_run == 3


def test_what_a_batch_shares() -> None:
    base = ImageRequest("a", scale=5, init_img=INIT, strength=0.5)
    other = {
        "prompt": "b",
        "negative_prompt": "c",
        "seed": 9,
        "scale": 3,
        "init_img": Image.new("RGB", (9, 9)),
        "watermark": "none",
        "resize": "pad",
    }
    assert replace(base, **other).batch_key() == base.batch_key()
    for own in (
        {"scale": 1},
        {"steps": 20},
        {"strength": 0.6},
        {"height": 64},
        {"sampler": "euler"},
        {"eta": 0.5},
        {"cfg_rescale": 0.5},
        {"guidance_end": 0.5},
        {"zero_snr": True},
        {"rng": "compvis"},
        {"init_img": None, "strength": None},
    ):
        assert replace(base, **own).batch_key() != base.batch_key()


def test_settings_are_those_in_use() -> None:
    request = ImageRequest("a", init_img="inputs/red.png", strength=0.5, seed=3)
    found = request.settings()
    assert (
        found.items() >= {"prompt": "a", "init_img": "inputs/red.png", "strength": 0.5, "steps": 50}.items()
    )
    assert "eta" not in found
    assert not {"init_img", "resize", "background"} & ImageRequest("a").settings().keys()
    assert image_name(INIT) == "image"


def test_seeds_wrap_around() -> None:
    assert image_seed(MAX_SEED, 1) == 0
    assert image_seed(42, 3) == 45


def test_what_is_said_in_vain() -> None:
    assert ImageRequest(negative_prompt="x", scale=2).in_vain() == []
    assert "does nothing at --scale 1" in ImageRequest(negative_prompt="x", scale=1).in_vain()[0]
    assert "--schedule karras" in ImageRequest(sampler="dpm_fast", schedule="karras").in_vain()[0]


def test_every_setting_has_its_help_and_is_checked() -> None:
    for name, each in settings_of(ImageRequest).items():
        assert each.help
        assert each.default is None or each.check(each.default) == each.default, name


def test_requests_are_checked_without_torch() -> None:
    code = (
        "import sys; from ldm.pipeline import ImageRequest, RuntimeOptions; ImageRequest(sampler='Euler a'); "
        "RuntimeOptions(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", IMAGE_SETTINGS)
def test_images_are_files_or_of_pillow(name: str) -> None:
    """An array as a mask was a traceback, and as an init image a message with all of its pixels."""
    values = {"init_img": "a.png", "strength": 0.5, name: np.zeros((3, 3))}
    with pytest.raises(FieldError, match=f"{name} is an object of type ndarray: give a file's name or a PIL"):
        ImageRequest("a cat", **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"noise_level": 0, "init_img": "i.png", "rng": "compvis"}, "noise_level is for rng image"),
        ({"noise_level": 0, "mask": "m.png", "init_img": "i.png"}, "mask and noise_level are for different"),
        ({"crop_to_mask": 0}, "crop_to_mask without mask"),
    ],
)
def test_a_value_of_0_is_given(values: dict, words: str) -> None:
    """As 0 equals False, these passed for settings that were not given."""
    with pytest.raises(FieldError) as error:
        ImageRequest(**values)
    assert words in str(error.value)


def test_no_churn_is_as_if_it_were_not_given() -> None:
    """It was refused: s_churn without s_churn."""
    assert ImageRequest(sampler="euler", s_churn=0.0).s_churn == 0


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_no_churn_is_no_option_of_a_sampler_without_any(sampler: str) -> None:
    """The check let a churn of 0 pass, and the sampler was called with it: a TypeError."""
    assert ImageRequest(sampler=sampler, s_churn=0.0).options == {}
