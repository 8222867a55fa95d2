import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_service
from commands import Result
from PIL import Image

from ldm.cli import arguments, parser
from ldm.pipeline.adapters import Adapters
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest
from ldm.pipeline.settings.control import Control
from ldm.webui.command import INPUT_FILES, command_line, input_images
from ldm.webui.controls import controls, request_of
from ldm.webui.files import Files
from ldm.webui.page import image_of
from ldm.webui.sheets import SCRIPT, Axis, sheet_of
from ldm.webui.tasks import ENLARGE, IMAGE, OVER_DEPTH, PAINT, TASKS, TEXT, Task
from ldm.weights.loading import choose_model

PARSERS = {
    "txt2img.py": parser.txt2img_parser,
    "img2img.py": parser.img2img_parser,
    "inpaint.py": parser.inpaint_parser,
    "depth2img.py": parser.depth2img_parser,
    "upscale.py": parser.upscale_parser,
}
SMALL = Image.new("RGB", (64, 64), "red")


def asked(task: Task, held: dict, inputs: dict | None = None, seed: int = 7) -> ImageRequest:
    values = {name: control.value for name, control in controls().items()}
    return request_of(task, values | {"prompt": "a cube", "seed": str(seed)} | held, inputs or {})


def parsed(line: str) -> arguments.Arguments:
    """The command's arguments, by the parser of its own script."""
    python, script, *words = shlex.split(line)
    assert python == "python"
    return arguments.parse(PARSERS[Path(script).name](), words)


def with_names(request: ImageRequest) -> ImageRequest:
    """The request with the names that the command has for its images."""
    names = {name: INPUT_FILES[name] for name in IMAGE_SETTINGS if getattr(request, name) is not None}
    return request.twin(**names, control=tuple(replace(one, image="control.png") for one in request.controls))


@pytest.mark.parametrize(
    ("task", "held", "inputs"),
    [
        (TEXT, {}, {}),
        (TEXT, {"prompt": '- it\'s "a" $cube; `ls`\n&& --seed 3', "negative_prompt": "-x"}, {}),
        (TEXT, {"prompt": ""}, {}),
        (TEXT, {"width": "128", "height": "64", "steps": "9", "scale": "-2.5", "sampler": "euler"}, {}),
        (TEXT, {"sampler": "dpmpp_2m", "schedule": "karras", "rho": "6.5", "cfg_rescale": 0.7}, {}),
        (TEXT, {"timesteps": "999,700.5,400", "eta": "0.3"}, {}),
        (TEXT, {"zero_snr": "off"}, {}),
        (TEXT, {"sampler": "euler", "s_churn": "3", "s_tmin": "0.1", "s_tmax": "9", "s_noise": "1.01"}, {}),
        (TEXT, {"variation_seed": str(2**63 - 1), "variation_strength": "0.25"}, {}),
        (TEXT, {"tiling": "both", "panorama": True, "long_prompts": True, "clip_skip": "2"}, {}),
        (TEXT, {"hires": "2", "hires_upscaler": "lanczos", "hires_steps": "5", "hires_strength": "0.6"}, {}),
        (TEXT, {"apg_eta": 0.2, "apg_momentum": -0.5, "watermark": "none", "guidance_end": 0.8}, {}),
        (TEXT, {"prompt_to": "a cone", "prompt_mix": 0.5, "prompt_syntax": "a1111"}, {}),
        (TEXT, {}, {"lora": ("a.safetensors:0.8", "b.safetensors:1:0.5"), "embedding": ("c.pt",)}),
        (
            TEXT,
            {"control_preprocess": "canny", "canny_thresholds": "50,80", "control_resize": "crop"},
            {"control": (Control("net.safetensors", SMALL, 0.5, 0.1, 0.9),)},
        ),
        (IMAGE, {}, {"init_img": SMALL}),
        (IMAGE, {"strength": "0.4", "resize": "pad", "background": "#123456"}, {"init_img": SMALL}),
        (PAINT, {}, {"init_img": SMALL, "mask": SMALL}),
        (PAINT, {"mask_blur": 2, "crop_to_mask": "16", "soft": True}, {"init_img": SMALL, "mask": SMALL}),
        (PAINT, {"outpaint": "0,8,16,0"}, {"init_img": SMALL}),
        (OVER_DEPTH, {}, {"init_img": SMALL}),
        (OVER_DEPTH, {}, {"depth": SMALL}),
        (ENLARGE, {}, {"init_img": SMALL}),
        (ENLARGE, {"noise_level": "40", "tile": "32"}, {"init_img": SMALL}),
    ],
)
def test_the_command_asks_for_the_same(task: Task, held: dict, inputs: dict) -> None:
    """Parsed by its script, it gives the page's request; so it does for each image of several."""
    request = asked(task, held, inputs)
    command = parsed(command_line(task, request, 3))
    assert (command.run.n_samples, command.run.n_iter) == (3, 1)
    found = command.request.twin(seed=command.run.seed, control=command.request.controls)
    assert found == with_names(request)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_command_takes_the_same_model(task: Task) -> None:
    inputs = {} if task is TEXT else {"init_img": SMALL, "mask": SMALL if task is PAINT else None}
    request = asked(task, {}, {name: image for name, image in inputs.items() if image is not None})
    assert "--ckpt" not in command_line(task, request, files=choose_model(None, None, task.does))
    if task in (TEXT, IMAGE):
        files = choose_model(None, "models/scenes-64-v/model.safetensors")
        command = parsed(command_line(task, request, files=files))
        assert (command.files.config, command.files.weights) == (files.config, files.weights)


def test_the_command_computes_alike() -> None:
    runtime = RuntimeOptions(device="cpu", precision="full", batch_size=8, tome=0.25, eager=True)
    command = parsed(command_line(TEXT, asked(TEXT, {}), runtime=runtime))
    assert command.runtime == RuntimeOptions(precision="full", tome=0.25, eager=True)


@pytest.mark.parametrize("syntax", ["a1111", "plain"])
@pytest.mark.parametrize("folder", ["models/loras", "own loras"])
def test_a_lora_of_the_prompt_is_looked_for_where_the_page_does(
    syntax: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command looked for it in models/loras, and found none."""
    (tmp_path / "own loras").mkdir()
    monkeypatch.chdir(tmp_path)
    request = asked(TEXT, {"prompt": "a <lora:ink:0.5>", "prompt_syntax": syntax})
    given = parsed(command_line(TEXT, request, lora_folder=folder)).given
    named = syntax == "a1111" and folder != "models/loras"
    assert given.get("lora_folder") == (folder if named else None)
    plain = parsed(command_line(TEXT, asked(TEXT, {}), lora_folder=folder)).given
    assert plain.get("lora_folder") is None


def test_the_command_finds_a_lora_that_lies_beside_the_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command looks in one folder alone: of an own LoRA and the bundled one it found only the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    for name in ("ink", "lora"):
        (tmp_path / "own" / f"{name}.safetensors").touch()
    loras = Files.found("own").loras.values()
    path = next(one for one in loras if one.endswith("few-steps.safetensors"))
    prompt = "a <lora:ink:0.5> <lyco: Few-Steps:te=0.5:unet=1> <lora:lora> <lora:few-steps.safetensors>"
    request = asked(TEXT, {"prompt": prompt, "prompt_syntax": "a1111"})
    further = ["--x", "prompt", "b <lora:few-steps:1>"]
    line = command_line(TEXT, request, lora_folder="own", loras=loras, further=further)
    words = shlex.split(line)
    wanted = f"a <lora:ink:0.5> <lora:{path}:te=0.5:unet=1> <lora:lora> <lora:{path}>"
    assert words[words.index("--prompt") + 1] == wanted
    assert words[words.index("--lora_folder") + 1] == "own"
    assert words[-1] == f"b <lora:{path}:1>"
    assert Adapters("own").find(path).samefile(path)
    (tmp_path / "own" / "few-steps.pt").touch()  # an own one of the name goes first
    for given in ({"lora_folder": "own"}, {"lora_folder": "models/loras"}):
        words = shlex.split(command_line(TEXT, request, loras=Files.found("own").loras.values(), **given))
        assert "<lyco: Few-Steps:te=0.5:unet=1>" in words[words.index("--prompt") + 1]


@pytest.mark.parametrize("name", ["few-steps", "Few-Steps.safetensors"])
def test_a_lora_below_the_own_folder_goes_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page drew with the own one and the command with the bundled one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "sub").mkdir(parents=True)
    (tmp_path / "own" / "sub" / "few-steps.safetensors").touch()
    request = asked(TEXT, {"prompt": f"a <lora:{name}:0.5>", "prompt_syntax": "a1111"})
    loras = Files.found("own").loras.values()
    words = shlex.split(command_line(TEXT, request, lora_folder="own", loras=loras))
    assert words[words.index("--prompt") + 1] == request.prompt


def test_the_command_checks_images_alike() -> None:
    """What the page had blackened, or not, the command did otherwise."""
    assert parsed(command_line(TEXT, asked(TEXT, {}), safety="off")).run.safety == "off"
    assert "--safety" not in command_line(TEXT, asked(TEXT, {}))


def test_the_images_that_it_starts_from() -> None:
    control = Control("net.safetensors", SMALL)
    request = asked(PAINT, {}, {"init_img": SMALL, "mask": SMALL, "control": (control,)})
    assert list(input_images(request)) == ["init.png", "mask.png", "control.png"]


def test_a_sheets_command_has_its_cells() -> None:
    held = {name: control.value for name, control in controls().items()} | {"prompt": "a cube"}
    x, y = Axis.of("steps", "5, 10"), Axis.of("sampler", "ddim, Euler a")
    sheet = sheet_of(TEXT, held, {}, 3, x, y)
    base = request_of(TEXT, held, {}).twin(seed=3)
    line = command_line(TEXT, base, further=sheet.words(), script=SCRIPT)
    from commands import script

    table = script("compare").parse(shlex.split(line)[2:])
    assert [request for _, request in table.cells] == list(sheet.cells)


def test_the_command_makes_the_same_pixels(
    command: Callable[..., Result], model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an image drawn over another one: the page's engine, and the command in a folder with its images."""
    config, weights = model
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    held = {"steps": "4", "sampler": "euler_ancestral", "strength": "0.6", "negative_prompt": "grey"}
    request = asked(IMAGE, held, {"init_img": start}, seed=11)
    with tiny_service.running(model) as engine:
        job = engine.submit([image_of(request, k) for k in range(2)], client="page").wait(120)
        files = engine.models.reader("tiny").files
    assert job.state == "finished", job.error
    for name, image in input_images(request).items():
        image.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _, script, *words = shlex.split(command_line(IMAGE, image_of(request, 1), files=files))
    result = command(Path(script).stem, *words)
    assert result.code == 0, result.err
    assert np.abs(result.images[0] - job.images[1].pixels.astype(int)).max() <= 1
    assert str(config) in words
    assert isinstance(engine.models.reader("tiny"), Pipeline)
    assert str(weights) in words
