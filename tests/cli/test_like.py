"""--like: an image's settings as the command's, under the flags that are given."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from commands import Result, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from ldm.cli import like
from ldm.cli.arguments import gather
from ldm.cli.like import RUNTIME, settings_like
from ldm.cli.parser import inpaint_parser, txt2img_parser, upscale_parser
from ldm.errors import InputError
from ldm.fields import changed, settings_of
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.runs.options import RunOptions
from ldm.weights.hashes import file_hash, quick_hash
from ldm.weights.loading import BUNDLED_WEIGHTS, find

Command = Callable[..., Result]


@pytest.fixture
def base(model: tuple[Path, Path]) -> list[object]:
    return ["--config", model[0], "--ckpt", model[1], "--watermark", "none"]


@pytest.fixture
def txt2img(command: Command, base: list[object]) -> Command:
    return lambda *argv, folder="out": command("txt2img", *base, *map(str, argv), folder=folder)


SETTINGS = [
    "--ddim_steps 3 --seed 7 --negative_prompt dog --scale 3.5 --H 24",
    "--sampler euler_ancestral --schedule karras --rho 5 --steps 4 --eta 0.7 --s_noise 1.1",
    "--sampler dpmpp_sde --steps 3 --cfg_rescale 0.5 --guidance_end 0.8 --variation_seed 9 "
    "--variation_strength 0.3",
    "--plms --steps 5",
    "--dpm_solver --steps 4 --guidance_start 0.3",
    "--timesteps 999,700.5,100 --ddim_eta 0.5",
    "--sigmas 10,3.3,0.2,0 --sampler heun --s_churn 2 --s_tmin 0.1 --s_tmax 8",
    "--fixed_code --steps 3 --ddim_eta 1",
    "--seed -1 --steps 2",
]


@pytest.mark.parametrize("argv", SETTINGS)
def test_an_image_is_made_again(txt2img: Command, argv: str) -> None:
    """At batch size 1 pixel for pixel, from its file alone; out of a larger batch to a level."""
    argv = ["--prompt", 'a cat: 50 %, "o"', *argv.split()]
    alone = txt2img(*argv, "--n_samples", 1, "--n_iter", 3, folder="alone")
    again = txt2img("--like", alone.paths[2])
    assert again.code == 0
    assert len(again.paths) == 1
    assert np.array_equal(again.images[0], alone.images[2])
    changes = {"image", "seed", "n_samples", "variation_seed"}
    assert {k: v for k, v in again.settings[0].items() if k not in changes} == {
        k: v for k, v in alone.settings[2].items() if k not in changes
    }
    together = txt2img(*argv, "--seed", 7, "--n_samples", 3, "--n_iter", 1, folder="together")
    again = txt2img("--like", together.paths[1], folder="again")
    assert abs(again.images[0] - together.images[1]).max() <= 1


def test_what_was_turned_off_stays_off(command: Command, base, tmp_path: Path) -> None:
    """A switch that the model turns on came on again, as what is off was taken for what is not recorded."""
    marks = {name: torch.zeros(1) for name in ("v_pred", "ztsnr")}
    save_file(tiny.state_dict() | marks, tmp_path / "marked.safetensors")
    model = ["--config", base[1], "--ckpt", tmp_path / "marked.safetensors", "--watermark", "none"]
    argv = ["--prompt", "a cat", "--steps", 2, "--n_samples", 1, "--n_iter", 1]
    off = command("txt2img", *model, *argv, "--no-zero_snr", folder="off")
    assert off.settings[0]["zero_snr"] is False
    again = command("txt2img", *model, "--like", off.paths[0], folder="again")
    assert np.array_equal(again.images[0], off.images[0])
    on = command("txt2img", *model, *argv, folder="on")
    assert on.settings[0]["zero_snr"] is True
    assert not np.array_equal(on.images[0], off.images[0])
    other = command("txt2img", *base, *argv, folder="other")  # whose model has no zero SNR
    assert other.settings[0]["zero_snr"] is False
    assert command("txt2img", *model, "--like", other.paths[0], folder="by").settings[0]["zero_snr"] is True


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_from_other_formats(txt2img: Command, format: str) -> None:
    argv = ["--prompt", "a cat", "--steps", 3, "--n_samples", 1, "--n_iter", 1]
    plain = txt2img(*argv, folder="plain")
    txt2img(*argv, "--format", format, folder="other")
    again = txt2img("--like", plain.folder.parent / f"other/samples/00000.{format}")
    assert np.array_equal(again.images[0], plain.images[0])


def test_image_to_image(command: Command, base, tmp_path: Path, txt2img: Command) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "init.png")
    argv = [
        "--init-img",
        tmp_path / "init.png",
        "--strength",
        0.6,
        "--steps",
        5,
        "--H",
        16,
        "--resize",
        "crop",
    ]
    first = command("img2img", *base, *argv, "--n_samples", 1)
    again = command(
        "img2img", *base, "--like", first.paths[0], "--init-img", tmp_path / "init.png", folder="b"
    )
    assert np.array_equal(again.images[0], first.images[0])
    refused(
        command("img2img", *base, "--like", first.paths[0], folder="c"),
        "it was made from init.png; give that as --init-img",
    )
    refused(txt2img("--like", first.paths[0], folder="d"), "from init.png by image to image; use img2img.py")


def test_other_flags_override(txt2img: Command) -> None:
    first = txt2img("--sampler", "euler_ancestral", "--eta", 0.5, "--schedule", "karras", "--steps", 3)
    again = txt2img("--like", first.paths[1], "--plms", "--scale", 2, "--n_samples", 2, folder="b")
    assert again.code == 0
    made = again.settings[1]
    assert (made["sampler"], made["scale"], made["steps"], made["seed"]) == ("plms", 2.0, 3, 44)
    assert not {"schedule", "eta"} & made.keys()
    again = txt2img("--like", first.paths[1], "--steps", 5, "--prompt", "a dog", "--seed", 1, folder="c")
    made = again.settings[0]
    assert (made["sampler"], made["eta"], made["schedule"]) == ("euler_ancestral", 0.5, "karras")
    assert (made["steps"], made["prompt"], made["seed"]) == (5, "a dog", 1)
    lists = txt2img("--timesteps", "900,400", folder="d")
    made = txt2img("--like", lists.paths[0], "--steps", 4, folder="e").settings[0]
    assert (made["steps"], "timesteps" in made) == (4, False)


@pytest.mark.parametrize("option", ["timesteps", "sigmas"])
def test_a_list_overrides_the_number_of_steps(option: str) -> None:
    """The image's steps were refused beside a list of the user's, unless they were 50."""
    found = settings_like({"prompt": "a cat", "steps": 20, "schedule": "karras"}, {option})
    assert found == {"prompt": "a cat"}


def test_from_the_text_of_other_tools(txt2img: Command, tmp_path: Path) -> None:
    text = "a cat\nNegative prompt: a dog\nSteps: 3, Sampler: Euler a, Schedule type: Karras, CFG scale: 4, "
    text += "Seed: 5, Size: 16x24, Model hash: 0123456789, Model: v1-5, Clip skip: 1"
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (16, 24)).save(tmp_path / "a.png", pnginfo=chunks)
    result = txt2img("--like", tmp_path / "a.png")
    assert result.code == 0
    assert (
        "--like: that image is by v1-5 (0123456789), this is tiny.safetensors: it will differ" in result.err
    )
    made = result.settings[0]
    assert (made["prompt"], made["negative_prompt"], made["steps"], made["scale"]) == ("a cat", "a dog", 3, 4)
    assert (made["sampler"], made["schedule"], made["seed"]) == ("euler_ancestral", "karras", 5)
    assert (made["width"], made["height"]) == (16, 24)


@pytest.mark.parametrize("whole", [True, False], ids=["ten digits", "eight digits"])
def test_hashes_of_both_kinds(
    txt2img: Command, model: tuple[Path, Path], tmp_path: Path, whole: bool
) -> None:
    """An image with the ten digits of the same file was taken for another model's."""
    recorded = {"prompt": "a cat", "steps": 1, "seed": 3, "checkpoint": "other.ckpt"}
    digits = (file_hash if whole else quick_hash)(model[1])
    same = image_file(tmp_path / "same.png", recorded | {"model_hash": digits.upper()})
    result = txt2img("--like", same, folder="same")
    assert (result.code, result.err) == (0, [])
    other = digits[::-1]
    result = txt2img("--like", image_file(tmp_path / "other.png", recorded | {"model_hash": other}))
    differs = f"--like: that image is by other.ckpt ({other}), this is {model[1].name}: it will differ"
    assert (result.code, result.err) == (0, [differs])


def test_the_bundled_model_is_found_by_its_hash(command: Command) -> None:
    first = command("txt2img", "--prompt", "a red cube", "--steps", 2, "--n_samples", 1, "--n_iter", 1)
    again = command("txt2img", "--like", first.paths[0], folder="b")
    assert np.array_equal(first.images[0], again.images[0])
    assert not any("will differ" in line for line in again.err)


def test_the_bundled_model_enlarges_nothing(tmp_path: Path) -> None:
    """It was chosen for upscale.py, too, which then refused it, if it had made the small image of --like."""
    recorded = {"prompt": "a red cube", "model_hash": file_hash(find(BUNDLED_WEIGHTS))}
    image = str(image_file(tmp_path / "small.png", recorded))
    files = gather(upscale_parser(), {"like": image, "init_img": [image]}).files
    assert files.weights != find(BUNDLED_WEIGHTS)
    assert gather(inpaint_parser(), {"like": image, "init_img": image}).files.weights == find(BUNDLED_WEIGHTS)


def image_file(path: Path, recorded: object) -> Path:
    """An image that claims these settings."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("stable-diffusion", json.dumps(recorded))
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"prompt": "a", "steps": 0}, "--like, or a flag that does not go with it: argument --ddim_steps"),
        ({"prompt": "a", "seed": {"a": 1}}, "is not a whole number in range"),
        ({"prompt": "a", "weights": "best"}, "argument --weights: invalid choice: 'best'"),
        ({"prompt": "a", "height": 17}, "--H 17 is not a multiple of 8"),
        ({"prompt": "a", "sampler": "../../x"}, "--sampler ../../x is not known"),
        (
            {"prompt": "a", "rng": "compvis", "image": 3, "n_samples": 2},
            "image 3 of a run in the original's one",
        ),
    ],
)
def test_unusable_settings_are_refused(txt2img: Command, tmp_path: Path, recorded, words: str) -> None:
    refused(txt2img("--like", image_file(tmp_path / "a.png", recorded)), "--like", words)


def test_images_without_settings_are_refused(txt2img: Command, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    refused(txt2img("--like", tmp_path / "a.png"), "--like:", "carries no settings")
    refused(txt2img("--like", tmp_path / "no.png"), "--like:", "No such file")
    (tmp_path / "b.png").write_bytes(b"no image")
    refused(txt2img("--like", tmp_path / "b.png"), "--like:", "b.png")


def test_compare_takes_it_too(command: Command, base, txt2img: Command) -> None:
    first = txt2img("--sampler", "heun", "--steps", 3, "--prompt", "a cat")
    sheet = command(
        "compare", *base, "--like", first.paths[1], "--x", "scale", 1, 2, "--y", "steps", 2, 3, folder="s"
    )
    assert sheet.code == 0
    assert [(s["sampler"], s["seed"], s["prompt"]) for s in sheet.settings] == [("heun", 43, "a cat")] * 4


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


NEVER_RECORDED = [*settings_of(RunOptions), "ckpt", "config", "allow_target", "from_file", "devices", "debug"]
NAMES = [*settings_of(ImageRequest), *settings_of(RuntimeOptions), *NEVER_RECORDED]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*NAMES, "weights", "image", "model_hash"]), values, max_size=8))
def test_whatever_an_image_records(recorded: dict) -> None:
    """Any settings make a request or an InputError, and reach no option that images never record."""
    plain, chosen = gather(txt2img_parser(), {}), {"like": "a.png"}
    with patch.object(like, "read_image", return_value=recorded):
        try:
            found = gather(txt2img_parser(), chosen)
            request = found.request
        except InputError:
            return
    assert dict(found.given) == chosen
    assert replace(found.run, seed=42) == replace(plain.run, n_samples=1, n_iter=1)
    assert changed(found.runtime).keys() <= {*RUNTIME}
    assert found.weights in (None, "raw", "ema")
    assert request.init_img is None
    assert all(
        isinstance(value, str) for value in (request.prompt, request.negative_prompt, request.watermark)
    )


def test_an_image_of_the_web_ui_is_read_by_its_rules(txt2img: Command, tmp_path: Path) -> None:
    """Weights in its prompt were read as text; what the user gives has the say."""
    text = "a (cat:1.2)\nSteps: 1, Sampler: Euler a, Seed: 3, Size: 16x16, Version: v1.10.1"
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (16, 16)).save(tmp_path / "theirs.png", pnginfo=info)
    (made,) = txt2img("--like", tmp_path / "theirs.png").settings
    assert (made["prompt"], made["prompt_syntax"], made["long_prompts"]) == ("a (cat:1.2)", "a1111", True)
    argv = ["--like", tmp_path / "theirs.png", "--prompt_syntax", "plain"]
    (plain,) = txt2img(*argv, folder="plain").settings
    assert "prompt_syntax" not in plain


def theirs(path: Path, fields: str) -> Path:
    """An image with a text of the web UI."""
    info = PngInfo()
    info.add_text("parameters", f"a cat\nSteps: 1, Seed: 3, Size: 16x16, {fields}")
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            'Sampler: Euler, Sigma noise: 1.1, ControlNet 0: "Module: canny", TI hashes: "x: 1", User: me',
            "not taken over: ControlNet 0, TI hashes, Sigma noise",
        ),
        (
            "Sampler: Euler, Schedule type: Beta, Version: v1.10.1",
            "AUTOMATIC1111's schedule Beta places sigmas",
        ),
        ("Sampler: Euler, Schedule type: Beta, Version: f2.0.1v1.10.1-previous-669", ""),
        ("Sampler: Euler, Tiling: True, Init image hash: 12, Version: v1.6.0", ""),
    ],
)
def test_what_is_not_taken_over_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: str, line: str
) -> None:
    """Settings of the web UI that are none here were dropped without a word."""
    image = str(theirs(tmp_path / "a.png", fields))
    gather(txt2img_parser(), {"like": image})
    assert len(caplog.messages) == bool(line)
    assert all(said.startswith(f"--like: {line}") for said in caplog.messages)
    caplog.clear()
    gather(txt2img_parser(), {"like": image, "quiet": True})
    assert caplog.messages == []


def test_what_the_web_ui_has_under_other_names_is_taken_over(tmp_path: Path) -> None:
    image = str(theirs(tmp_path / "a.png", "Sampler: Euler, Tiling: True, Token merging ratio: 0.3"))
    found = gather(txt2img_parser(), {"like": image})
    assert (found.request.tiling, found.runtime.tome) == ("both", 0.3)


def test_a_second_pass_that_no_factor_gives_is_refused(txt2img: Command, tmp_path: Path) -> None:
    """It was made at another size, by the factor of the width."""
    fields = "Sampler: Euler, Denoising strength: 0.5, Hires resize: 32x24, Hires upscaler: Latent"
    image = theirs(tmp_path / "a.png", fields)
    why = "its second pass was at 32x24, which no factor makes of its first one's size; give --hires"
    refused(txt2img("--like", image), f"--like {image}: {why}")
    found = gather(txt2img_parser(), {"like": str(image), "hires": 2.0, "quiet": True}).request
    assert (found.hires, found.hires_strength) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("recorded", "own", "expected"),
    [
        ({"sampler": "ddim", "eta": 0.0}, {"sampler": "euler"}, {"sampler": "euler", "eta": None}),
        ({"sampler": "plms", "schedule": "karras"}, {"sampler": "euler"}, {"schedule": None}),
        ({"timesteps": [900, 400], "steps": 2}, {"steps": 5}, {"steps": 5, "timesteps": None}),
        ({"schedule": "karras", "steps": 3}, {"sigmas": (9.0, 1.0, 0.0)}, {"steps": 2, "schedule": None}),
        ({"schedule": "karras"}, {"steps": 5}, {"steps": 5, "schedule": "karras"}),
        ({"prompt_to": "b", "prompt_mix": 0.5}, {"prompt": "c"}, {"prompt": "c", "prompt_to": ""}),
        ({"fixed_code": True, "start_seed": 9}, {"seed": 4}, {"seed": 4, "start_seed": 9}),
    ],
)
def test_options_of_a_line_go_over_the_images(recorded: dict, own: dict, expected: dict) -> None:
    """--eta 0: euler has no such option, it said of an eta that nobody had given."""
    with patch.object(like, "read_image", return_value={"prompt": "a"} | recorded):
        command = gather(txt2img_parser(), {"like": "a.png"})
    request = command.variant(own)
    assert {name: getattr(request, name) for name in expected} == expected


def test_what_the_user_gives_stays_beside_a_lines_options() -> None:
    with patch.object(like, "read_image", return_value={"prompt": "a", "sampler": "heun", "s_churn": 2.0}):
        command = gather(txt2img_parser(), {"like": "a.png", "eta": 0.5})
    assert command.variant({"sampler": "euler_ancestral"}).options == {"eta": 0.5}
    with pytest.raises(InputError, match="euler has no such option"):
        command.variant({"sampler": "euler"})


def test_the_controlnet_of_an_image_is_left_out() -> None:
    """Its image had to be there, or one of another ControlNet."""
    recorded = {"prompt": "a", "control": ["c.pth:edges.png"], "control_preprocess": ["canny"]}
    with patch.object(like, "read_image", return_value=recorded):
        with pytest.raises(InputError, match="give that as --control"):
            gather(txt2img_parser(), {"like": "a.png"})
        command = gather(txt2img_parser(), {"like": "a.png", "control": ["none"]})
    assert (command.request.control, command.request.control_preprocess) == ((), ())
