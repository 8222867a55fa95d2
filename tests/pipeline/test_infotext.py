"""The settings of images as text: ours, and those of AUTOMATIC1111's web UI."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import noise, png
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import __version__
from ldm.errors import InputError
from ldm.fields import setting
from ldm.images.metadata import encode_image, read_texts
from ldm.images.outputs import OutputFolder
from ldm.pipeline.infotext import (
    NoSettings,
    a1111_parameters,
    image_texts,
    parse_a1111,
    read_metadata,
    read_settings,
    without_folders,
)
from ldm.pipeline.request import ImageRequest
from ldm.sampling import catalogue

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "prompt": 'a café, 8k: "夜" 🎸\nsecond line',
    "negative_prompt": "blurry,\ndark",
    "steps": 50,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "scale": 7.5,
    "seed": 42,
    "width": 24,
    "height": 16,
    "model_hash": "fe4efff1e1",
    "checkpoint": "sd, v1.ckpt",
    "version": "0.1.0",
    "nsfw_content_detected": False,
}
MINIMAL = {"prompt": "a cat", "width": 8, "height": 8}
FORMATS = ["png", "jpg", "webp"]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dict_or_error(function, *args) -> None:
    with suppress(InputError):
        assert isinstance(function(*args), dict)


def last_line(settings: dict) -> str:
    return a1111_parameters(MINIMAL | settings).split("\n")[-1]


# files


@pytest.mark.parametrize("format", FORMATS)
def test_settings_come_back(tmp_path, format):
    path = tmp_path / f"image.{format}"
    path.write_bytes(encode_image(noise(), image_texts(SETTINGS), format))
    assert read_metadata(path) == read_settings(path) == SETTINGS
    assert read_texts(path) == (a1111_parameters(SETTINGS), json.dumps(SETTINGS))


@pytest.mark.parametrize("format", FORMATS)
def test_images_without_settings(tmp_path, format):
    path = tmp_path / f"image.{format}"
    path.write_bytes(encode_image(noise(), None, format))
    assert read_metadata(path) is None
    with pytest.raises(NoSettings, match=r"image\.\w+ carries no settings"):
        read_settings(path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "x" * 20_000,
        "夜" * 5_000,
        "first\r\n\x00\nSteps: 3",
        'say "hi", it\'s: 8k\\n, {"a": 1}',
        "first\nsecond\r\n\n  third\nSteps: 3",
        "caf\udce9",
    ],
)
def test_prompts_come_back_from_every_format(tmp_path, format, prompt):
    """Python makes lone surrogates of command-line bytes that are not UTF-8: they cost no image."""
    chosen = SETTINGS | {"prompt": prompt, "negative_prompt": prompt}
    path = tmp_path / "image"
    if format == "jpg" and len(prompt) == 5_000:  # \\u escapes: 60 kB
        chosen["negative_prompt"] = ""
    path.write_bytes(encode_image(noise(), image_texts(chosen), format))
    assert read_metadata(path) == chosen
    if format == "png":
        assert Image.open(path).text["parameters"].startswith(prompt.replace("\udce9", "?"))


def test_settings_come_back_without_the_users_folders(tmp_path):
    chosen = SETTINGS | {"index": 3, "eta": None, "init_img": "../x/y.jpg", "weights": "ema"}
    chosen |= {"checkpoint": "/home/ann/models/sd-v1-4.ckpt", "config": "configs/stable-diffusion/v1.yaml"}
    path = OutputFolder(tmp_path).save_image(noise(), image_texts(chosen))
    names = {"checkpoint": "sd-v1-4.ckpt", "config": "v1.yaml", "init_img": "y.jpg"}
    assert read_metadata(path) == without_folders(chosen) == chosen | names
    assert b"home" not in path.read_bytes()


def test_the_word_of_a_textual_inversion_may_have_a_slash():
    """What stood before the slash, the file with it, was left out as a folder."""
    found = without_folders(MINIMAL | {"embedding": ("a/x.pt:by/mucha", "b/y.bin")})
    assert found["embedding"] == ["x.pt:by/mucha", "y.bin"]


def test_texts_of_before_are_read_through_our_json(tmp_path):
    """They had no "Schedule type", which the web UI's text alone now says is Karras."""
    own = MINIMAL | {"sampler": "dpmpp_2m", "steps": 3}
    old_text = "a cat\nSteps: 3, Sampler: DPM++ 2M, Size: 8x8"
    (tmp_path / "image.png").write_bytes(encode_image(noise(), (old_text, json.dumps(own))))
    assert read_settings(tmp_path / "image.png") == own


def test_a_damaged_own_text_gives_way_to_the_other(tmp_path):
    for text in ("{", "[1]", "3", "null", "[" * 100_000, "9" * 5000):
        chunks = PngInfo()
        chunks.add_text("stable-diffusion", text)
        path = tmp_path / "own.png"
        Image.fromarray(noise()).save(path, pnginfo=chunks)
        with pytest.raises(InputError, match="are damaged"):
            read_metadata(path)
        with pytest.raises(NoSettings):
            read_settings(path)
        chunks.add_text("parameters", "a cat\nSteps: 3, Version: 0.1.0")
        Image.fromarray(noise()).save(path, pnginfo=chunks)
        assert read_settings(path) == {"prompt": "a cat", "steps": 3, "version": "0.1.0"}


@pytest.mark.parametrize("version", ["", ", Version: v1.10.1", ", Version: f2.0.1v1.10.1-previous-669"])
def test_prompts_of_the_web_ui_are_read_by_its_rules(tmp_path, version):
    """They were read as plain text of 75 tokens, so that --like made another image."""
    text = b"a (cat:1.2)\nSteps: 3" + version.encode()
    found = read_settings(png(tmp_path / "image.png", (b"tEXt", b"parameters\0" + text)))
    assert (found["prompt_syntax"], found["long_prompts"]) == ("a1111", True)


@pytest.mark.parametrize("own", [{}, {"prompt_syntax": "a1111"}, {"long_prompts": True}])
def test_our_text_says_how_its_prompts_are_read(tmp_path, own):
    chosen = MINIMAL | {"prompt": "a (cat:1.2)", "version": __version__} | own
    text = a1111_parameters(chosen)
    (tmp_path / "image.png").write_bytes(encode_image(noise(), (text, "{")))
    found = read_settings(tmp_path / "image.png")
    assert {name: found[name] for name in ("prompt_syntax", "long_prompts") if name in found} == own


# the web UI's text, written


def test_parameters_are_those_of_the_web_ui():
    chosen = {
        "prompt": "a cat",
        "negative_prompt": "blurry, dark",
        "steps": 50,
        "sampler": "plms",
        "scale": 7.5,
        "seed": 42,
        "width": 512,
        "height": 256,
        "checkpoint": "/home/ann/models/sd-v1-4.ckpt",
        "model_hash": "fe4efff1e1",
    }
    assert a1111_parameters(chosen) == (
        "a cat\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x256, "
        "Model hash: fe4efff1e1, Model: sd-v1-4"
    )
    assert a1111_parameters(MINIMAL) == "a cat\nSize: 8x8"
    assert "Sampler: a_new_one" in last_line({"sampler": "a_new_one"})
    assert "Denoising strength: 0, Eta: 0.5, Version: 1" in last_line(
        {"strength": 0, "eta": 0.5, "version": "1"}
    )
    assert "Model: stable-diffusion-2.1" in last_line({"checkpoint": "models/stable-diffusion-2.1/"})


def test_other_tools_can_parse_the_parameters():
    """With the pattern of AUTOMATIC1111's `parse_generation_parameters`."""
    text = a1111_parameters(SETTINGS | {"checkpoint": 'my "best", v2: final.safetensors'})
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    fields = dict(re.findall(pattern, text.splitlines()[-1]))
    assert fields["Model"] == r'"my \"best\", v2: final"'
    assert fields["Model hash"] == "fe4efff1e1"
    assert fields["Steps"] == "50"


@pytest.mark.parametrize(
    ("sampler", "schedule", "written"),
    [
        ("dpmpp_2m", None, "Uniform"),  # on DPM-Solver's grid, the web UI's nearest
        ("dpmpp_2m", "lcm", "Uniform"),
        ("dpmpp_sde", None, "Uniform"),
        ("dpmpp_2s_ancestral", "linspace", "Uniform"),
        ("dpmpp_2m", "karras", "Karras"),
        ("dpmpp_2m", "ays", "Align Your Steps"),
        ("euler", "trailing", "Simple"),
        ("euler", "sgm_uniform", "SGM Uniform"),
        ("euler", "polyexponential", "Polyexponential"),
        ("euler", "beta", "Beta"),
        ("ddim", "lcm", "Uniform"),
        ("euler", "Beta", "Beta"),
        ("a_new_one", "karras", "Karras"),
        ("euler", None, None),
        ("ddim", None, None),
        ("unipc", None, None),
        ("dpmpp_2m_sde", None, None),
        ("a_new_one", None, None),
    ],
)
def test_the_schedule_type_is_written_where_it_would_be_another_one(sampler, schedule, written):
    """It was left out for our DPM++ 2M on its own grid, and the web UI took Karras."""
    line = last_line({"sampler": sampler, "schedule": schedule})
    found = re.search("Schedule type: ([^,]+)", line)
    assert (found and found[1]) == written


def test_no_sampler_is_read_on_another_schedule():
    """Each sampler on its default, and on each schedule that the web UI has, comes back."""
    for sampler, facts in catalogue.SAMPLERS.items():
        if facts.ends_only:
            continue
        for schedule in (None, *catalogue.SCHEDULES):
            used = schedule or facts.schedule
            read = parse_a1111(a1111_parameters(MINIMAL | {"sampler": sampler, "schedule": schedule}))
            named = catalogue.SCHEDULES[used].a1111 or used == (facts.automatic or facts.schedule)
            assert read.get("schedule", facts.schedule) == (used if named else "linspace"), (
                sampler,
                schedule,
            )


@pytest.mark.parametrize("levels", [{"timesteps": [999, 500]}, {"sigmas": [14.6, 3, 0]}])
def test_own_noise_levels_have_no_schedule_type(levels):
    assert "Schedule type" not in last_line({"sampler": "dpmpp_2m"} | levels)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"sampler": "ddim", "eta": 0.5}, "Eta DDIM: 0.5"),
        ({"sampler": "euler_ancestral", "eta": 0.5, "s_noise": 1.01}, "Eta: 0.5, Sigma noise: 1.01"),
        (
            {"sampler": "euler", "s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01},
            "Sigma churn: 3.0, Sigma tmin: 0.1, Sigma tmax: 9.0, Sigma noise: 1.01",
        ),
    ],
)
def test_the_samplers_options(options, written):
    """The web UI calls DDIM's eta by another name, and the options of churn were in no text."""
    line = last_line(options)
    assert line.endswith(f"Size: 8x8, {written}")
    assert parse_a1111(line) == {"prompt": "", "width": 8, "height": 8} | options


# and read


FOREIGN = """masterpiece, (best quality:1.2),
a castle: at night

Negative prompt: blurry, EasyNegative
bad hands
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1234567890123, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned, Variation seed: 7, Variation seed strength: 0.25, Clip skip: 2, \
Lora hashes: "a: 1234, b: 5678", TI hashes: "say \\"x\\", y", Version: v1.6.0"""


def test_the_web_uis_text():
    assert parse_a1111(FOREIGN) == {
        "prompt": "masterpiece, (best quality:1.2),\na castle: at night\n",
        "negative_prompt": "blurry, EasyNegative\nbad hands",
        "steps": 28,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "scale": 6.5,
        "seed": 1234567890123,
        "width": 512,
        "height": 768,
        "model_hash": "6ce0161689",
        "checkpoint": "v1-5-pruned",
        "variation_seed": 7,
        "variation_strength": 0.25,
        "version": "v1.6.0",
        "clip_skip": 2,
        "lora_hashes": "a: 1234, b: 5678",
        "other": {"TI hashes": 'say "x", y'},
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Sampler: Euler a", {"sampler": "euler_ancestral"}),
        ("Sampler: DPM++ 2M SDE Exponential", {"sampler": "dpmpp_2m_sde", "schedule": "exponential"}),
        ("Sampler: DPM++ 2M SDE Karras", {"sampler": "dpmpp_2m_sde", "schedule": "karras"}),
        ("Sampler: DPM++ 2M, Schedule type: Karras", {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ("Sampler: Euler, Schedule type: Automatic", {"sampler": "euler"}),
        ("Sampler: Euler, Schedule type: Uniform", {"sampler": "euler", "schedule": "linspace"}),
        ("Sampler: Euler, Schedule type: Normal", {"sampler": "euler", "schedule": "linspace"}),
        ("Sampler: Euler, Schedule type: Simple", {"sampler": "euler", "schedule": "trailing"}),
        ("Sampler: Euler, Schedule type: Align Your Steps", {"sampler": "euler", "schedule": "ays"}),
        ("Sampler: Restart, Schedule type: SGM", {"sampler": "Restart", "schedule": "SGM"}),
        ("Sampler: DPM fast, Schedule type: Karras", {"sampler": "dpm_fast"}),
        ("Denoising strength: 0.4", {"strength": 0.4}),
        (
            "Steps: 9, Denoising strength: 0.4, Hires upscale: 2",
            {"steps": 9, "hires": 2.0, "hires_strength": 0.4},
        ),
        ('Steps: 3, Model: "a, b", Steps: 4', {"steps": 3, "checkpoint": "a, b"}),
        ("Steps: 3, nonsense, Seed: 5", {"steps": 3, "seed": 5}),
        ('Steps: 3, Model: "open, Seed: 5', {"steps": 3, "checkpoint": '"open', "seed": 5}),
        ("Size: 8x8", {"width": 8, "height": 8}),
        ("Seed: 1\r", {"seed": 1}),
    ],
)
def test_lines_of_settings(line, expected):
    assert parse_a1111(f"a cat\n{line}") == {"prompt": "a cat"} | expected


@pytest.mark.parametrize("type_", ["", ", Schedule type: Automatic", ", Schedule type: automatic"])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("DPM++ 2M", "karras"),
        ("DPM++ SDE", "karras"),
        ("DPM++ 2S a", "karras"),
        ("DPM++ 2M SDE", "exponential"),
        ("DPM++ 3M SDE", "exponential"),
    ],
)
def test_an_automatic_schedule_is_the_web_uis(name, schedule, type_):
    """It was taken for our own default, and --like made another image."""
    found = parse_a1111(f"a cat\nSteps: 9, Sampler: {name}{type_}")
    assert found.get("schedule", catalogue.SAMPLERS[found["sampler"]].schedule) == schedule
    request = ImageRequest(sampler=found["sampler"], schedule=found.get("schedule"))
    assert (request.schedule or catalogue.SAMPLERS[request.sampler].schedule) == schedule


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Sampler: DDIM, Eta DDIM: 0.5", {"sampler": "ddim", "eta": 0.5}),
        ("Eta DDIM: 0.5, Sampler: DDIM", {"sampler": "ddim", "eta": 0.5}),
        ("Sampler: DDIM, Eta: 1, Eta DDIM: 0.5", {"sampler": "ddim", "eta": 0.5}),
        ("Sampler: DDIM, Eta: 0.5", {"sampler": "ddim", "eta": 0.5}),
        ("Sampler: PLMS, Eta DDIM: 0.5", {"sampler": "plms", "other": {"Eta DDIM": "0.5"}}),
        ("Sampler: Euler a, Eta: 0.5", {"sampler": "euler_ancestral", "eta": 0.5}),
        ("Sampler: Euler a, Eta DDIM: 0.5", {"sampler": "euler_ancestral", "other": {"Eta DDIM": "0.5"}}),
        (
            "Sampler: Euler, Sigma churn: 3, Sigma tmin: 0.1",
            {"sampler": "euler", "s_churn": 3, "s_tmin": 0.1},
        ),
        ("Sampler: Euler, Sigma churn: 3, Sigma tmax: 0", {"sampler": "euler", "s_churn": 3}),
        ("Sampler: Euler, Sigma churn: 3, Sigma tmax: inf", {"sampler": "euler", "s_churn": 3}),
        (
            "Sampler: Euler, Sigma tmax: 9, Sigma noise: 1.1",
            {"sampler": "euler", "other": {"Sigma tmax": "9", "Sigma noise": "1.1"}},
        ),
        ("Sampler: Euler, Eta: 0.5", {"sampler": "euler", "other": {"Eta": "0.5"}}),
        (
            "Sampler: DPM++ SDE Karras, Sigma noise: 1.1",
            {"sampler": "dpmpp_sde", "schedule": "karras", "s_noise": 1.1},
        ),
    ],
)
def test_the_samplers_options_are_read(line, expected):
    """Those of churn and DDIM's eta were lost; those that do nothing in the sampler were refused."""
    assert parse_a1111(f"a cat\n{line}") == {"prompt": "a cat"} | expected


@pytest.mark.parametrize("digest", ["81761151", "6ce0161689", "0123456789", "0" * 64])
def test_model_hashes_of_any_length_are_text(digest):
    found = parse_a1111(f"a cat\nSteps: 3, Model hash: {digest}, Model: x")
    assert found["model_hash"] == digest
    assert parse_a1111(a1111_parameters(MINIMAL | {"model_hash": digest}))["model_hash"] == digest


@pytest.mark.parametrize(
    ("sampler", "scale", "line"),
    [
        ("ddim", 0.6, "Sampler: DDIM CFG++, CFG scale: 7.5"),  # the web UI divides its scale by 12.5
        ("ddim", 0.56, "Sampler: DDIM CFG++, CFG scale: 7.0"),
        ("euler_ancestral", 0.6, "Sampler: Euler a CFG++, CFG scale: 0.6"),
    ],
)
def test_cfg_pp_is_in_the_samplers_name(sampler, scale, line):
    """It was in no name, so that the text was that of another image; and "DDIM CFG++" was not known."""
    request = ImageRequest("a", sampler=sampler, cfg_pp=True, scale=scale, width=64, height=64)
    text = a1111_parameters(request.settings())
    assert line in text
    found = parse_a1111(text)
    assert (found["sampler"], found["cfg_pp"], found["scale"]) == (sampler, True, pytest.approx(scale))
    assert parse_a1111("Steps: 5, Sampler: DPM++ 2M CFG++")["sampler"] == "DPM++ 2M CFG++"
    assert "cfg_pp" not in parse_a1111("Steps: 5, Sampler: DDIM")


def test_a_text_of_prompts_only():
    assert parse_a1111("a cat, dog: 3") == {"prompt": "a cat, dog: 3"}
    assert parse_a1111("a\nNegative prompt:b\nc") == {"prompt": "a", "negative_prompt": "b\nc"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Steps: many", "Steps: 'many', which is not a whole number"),
        ("Steps: 2.5", "Steps: '2.5', which is not a whole number"),
        ("Seed: " + "9" * 5000, "Seed: '9{40}…', which"),
        ("CFG scale: nan", "CFG scale: 'nan', which is not a number"),
        ("Size: 512", "Size: '512', which is not WIDTHxHEIGHT"),
        ("Size: 512x-8", "Size: '512x-8', which"),
    ],
)
def test_malformed_values_are_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        parse_a1111(f"a cat\n{line}")
    path = png(tmp_path / "image.png", (b"tEXt", b"parameters\0a cat\n" + line.encode()))
    with pytest.raises(InputError, match=rf"image\.png: the A1111 text has {message}"):
        read_settings(path)


def test_a_long_line_takes_no_time():
    for text in (
        "a" * 300_000,
        " " * 300_000,
        'a:"' * 100_000,
        "a: b, " * 50_000,
        "Steps: " + '"\\' * 100_000,
    ):
        dict_or_error(parse_a1111, f"x\nSteps: 3, {text}")
        dict_or_error(parse_a1111, text)


@FUZZ
@given(st.text())
def test_no_text_breaks_the_parser(text):
    dict_or_error(parse_a1111, text)


@FUZZ
@given(st.text(), st.text(), st.sampled_from(["euler", "plms", "dpmpp_2m"]), st.integers(0, 2**63 - 1))
def test_our_own_text_is_read_back(prompt, model, sampler, seed):
    chosen = {"prompt": prompt, "sampler": sampler, "seed": seed, "width": 8, "height": 16, "steps": 3}
    text = a1111_parameters(chosen | {"checkpoint": "x" + model})
    found = parse_a1111(text)
    if not any(line.startswith("Negative prompt:") for line in prompt.split("\n")):
        assert found.items() >= chosen.items()


VALUES = st.one_of(
    st.text(max_size=20), st.sampled_from(['"', '"\\', "1", "1e999", "512x512", "Euler a", "0x1"])
)
NAMES = st.sampled_from(
    [
        "Steps",
        "Size",
        "Sampler",
        "Seed",
        "Model",
        "Hires x",
        "Negative prompt",
        "CFG scale",
        "Eta",
        "Sigma tmax",
    ]
)


@FUZZ
@given(st.text(max_size=20), st.lists(st.tuples(NAMES, VALUES)), st.sampled_from([", ", ",", "\n"]))
def test_no_fields_break_the_parser(prompt, fields, separator):
    dict_or_error(parse_a1111, prompt + "\n" + separator.join(f"{name}: {value}" for name, value in fields))


# new fields


@dataclass(frozen=True)
class WiderRequest(ImageRequest):
    grain: int | None = setting(None, "grains of the film", a1111="Film grain")
    style: str = setting("", "a style", a1111="My thing")
    tiled: bool = setting(False, "an image that repeats", a1111="Tiling")
    weights: tuple[float, ...] | None = setting(None, "of the prompt's parts", a1111="Part weights")


def test_a_field_with_a_name_of_the_web_ui_is_written_and_read(tmp_path):
    """Nothing but the field itself has to say so."""
    own = {"grain": 2, "style": "oil, on canvas", "tiled": True, "weights": (0.5, 1.0)}
    chosen = SETTINGS | own | {"sampler": "ddim", "schedule": None, "eta": 0.5}
    text = a1111_parameters(chosen, WiderRequest)
    assert (
        'Model: "sd, v1", Eta DDIM: 0.5, Film grain: 2, My thing: "oil, on canvas", Tiling: True, '
        'Part weights: "0.5,1.0", Version: 0.1.0'
    ) in text
    assert parse_a1111(text, WiderRequest).items() >= (own | {"eta": 0.5}).items()
    assert "Film grain" in parse_a1111(text)["other"]
    assert parse_a1111("a cat\nFilm grain: 3", WiderRequest) == {"prompt": "a cat", "grain": 3}
    texts = image_texts(chosen, WiderRequest)
    (tmp_path / "image.png").write_bytes(encode_image(noise(), (texts[0], "{")))
    assert read_settings(tmp_path / "image.png", WiderRequest)["style"] == "oil, on canvas"
    for line in ("Tiling: perhaps", "Part weights: 1;2"):
        with pytest.raises(InputError, match=line.replace(": ", ": '")):
            parse_a1111(f"a cat\n{line}", WiderRequest)


def test_importing_it_is_fast():
    code = "import sys, ldm.pipeline.infotext; print({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# settings of another form here


def test_seamless_images_and_merged_tokens_have_the_web_uis_names():
    """Both were left out of its text, and were read as nothing."""
    line = last_line({"tiling": "both", "tome": 0.5})
    assert line == "Size: 8x8, Tiling: True, Token merging ratio: 0.5"
    assert parse_a1111(line) == MINIMAL | {"prompt": "", "tiling": "both", "tome": 0.5}
    assert last_line({"tiling": "x", "tome": 0.0}) == "Size: 8x8"  # the web UI has no single axis
    assert parse_a1111("a cat\nSteps: 3, Tiling: False")["tiling"] == "none"
    beyond = parse_a1111("a cat\nSteps: 3, Tiling: perhaps, Token merging ratio: 0.9")
    assert beyond["other"] == {"Tiling": "perhaps", "Token merging ratio": "0.9"}


SECOND = "a cat\nSteps: 20, Size: 512x512, Denoising strength: 0.7, Hires upscaler: Latent, "


@pytest.mark.parametrize(
    ("resize", "hires"),
    [
        ("768x768", 1.5),
        ("1024x0", 2.0),
        ("0x1024", 2.0),
        ("772x768", 772 / 512),
        ("1024x768", None),
        ("0x0", None),
    ],
)
def test_a_second_passes_size_is_a_factor_or_no_setting(resize, hires):
    """The width alone counted: 1024x768 of 512x512 became 1024x1024."""
    found = parse_a1111(SECOND + f"Hires resize: {resize}")
    assert (found.get("hires"), found["hires_strength"]) == (hires, 0.7)
    assert found.get("other") == (None if hires else {"Hires resize": resize})


def test_a_second_pass_of_as_many_steps():
    """The web UI's 0 was refused as a number of steps."""
    found = parse_a1111(SECOND + "Hires upscale: 2, Hires steps: 0")
    assert (found["hires"], "hires_steps" in found) == (2.0, False)
    assert parse_a1111(SECOND + "Hires upscale: 2, Hires steps: 9")["hires_steps"] == 9


def test_weights_of_loras_keep_their_digits():
    """They were cut to six."""
    text = a1111_parameters(MINIMAL | {"lora": ["x:0.123456789:0.75"]})
    assert text.startswith("a cat <lora:x:0.75:0.123456789>\n")
    assert parse_a1111(text)["lora"] == ("x:0.123456789:0.75",)
