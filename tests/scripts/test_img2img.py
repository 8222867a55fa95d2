"""`scripts/img2img.py` from its arguments to its files, and what txt2img shares with it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import SCRIPTS, Result, effective, refused
from golden_files import case, golden_file
from PIL import Image

from ldm.cli.arguments import parse
from ldm.cli.parser import img2img_parser
from ldm.images.pixels import to_float, to_uint8
from ldm.pipeline.infotext import read_metadata
from ldm.pipeline.request import ImageRequest
from ldm.sampling import catalogue
from ldm.sampling.noise import ImageNoise, ImageSeeds
from ldm.scenes.captions import caption
from ldm.scenes.detector import load_detector
from ldm.scenes.renderer import render
from ldm.scenes.scene import Scene, Solid
from ldm.scenes.scores import check
from ldm.weights import loading

# Every flag of the original with its default; None is what the chosen model was made for.
ORIGINAL_FLAGS = {
    "--prompt": "a painting of a virus monster playing guitar",
    "--init-img": None,
    "--outdir": "outputs/img2img-samples",
    "--skip_grid": False,
    "--skip_save": False,
    "--ddim_steps": 50,
    "--plms": False,
    "--fixed_code": False,
    "--ddim_eta": 0.0,
    "--n_iter": 1,
    "--C": None,
    "--f": None,
    "--n_samples": 2,
    "--n_rows": 0,
    "--scale": None,
    "--strength": 0.75,
    "--from-file": None,
    "--config": None,
    "--ckpt": None,
    "--seed": 42,
    "--precision": None,  # half on a GPU, full on a CPU
}

Command = Callable[..., Result]


@pytest.fixture
def init(tmp_path: Path) -> Path:
    """An image of 16x24 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "init.png")
    return tmp_path / "init.png"


@pytest.fixture
def img2img(command: Command, model: tuple[Path, Path], init: Path) -> Command:
    """Run the command: four steps, one image of 16x24 pixels, unless `argv` says otherwise."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 4, "--n_samples", 1]
    base += ["--init-img", init, "--H", 24, "--W", 16, "--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("img2img", *base, *argv, folder=folder)


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run txt2img.py: four steps, one image of 16x24 pixels, unless `argv` says otherwise."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 4, "--n_samples", 1, "--n_iter", 1]
    base += ["--H", 24, "--W", 16, "--prompt", "a cat", "--watermark", "none", "--scale", 5]
    return lambda *argv, folder="txt2img": command("txt2img", *base, *argv, folder=folder)


@pytest.mark.slow
def test_images_are_the_originals(command: Command, mini_v1: Path) -> None:
    tensors, facts = case("img2img_075")
    argv = json.loads(facts["args"])
    argv = [golden_file(arg) if arg.startswith("cases/") else arg for arg in argv]
    config = golden_file("configs/mini-v1.yaml")
    result = command("img2img", "--rng", "compvis", "--config", config, "--ckpt", mini_v1, *argv)
    assert result.code == 0
    assert "img2img runs 15 of 20 steps" in result.err
    assert result.files == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    for k, image in enumerate(result.images):
        assert np.abs(image - tensors[f"image_{k}"].numpy()).max() <= 1


def test_every_flag_of_the_original_has_its_default(model: tuple[Path, Path]) -> None:
    argv = ["--config", str(model[0]), "--ckpt", str(model[1]), "--init-img", "init.png"]
    arguments = parse(img2img_parser(), argv)
    found = {flag: effective(arguments, flag) for flag in ORIGINAL_FLAGS}
    given = {"--config": str(model[0]), "--ckpt": str(model[1]), "--init-img": "init.png"}
    assert found == ORIGINAL_FLAGS | given


def test_every_flag_of_the_original_is_taken(img2img: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na bird\n")
    flags = f"""--prompt x --ddim_steps 4 --fixed_code --ddim_eta 0.5 --n_iter 2 --C 4 --f 8 --n_samples 2
        --n_rows 1 --scale 3 --strength 0.5 --seed 7 --precision full
        --from-file {tmp_path}/prompts.txt""".split()
    result = img2img(*flags)
    assert (result.code, result.err) == (0, ["img2img runs 2 of 4 steps"])
    settings = {"sampler": "ddim", "steps": 4, "strength": 0.5, "height": 24, "width": 16, "scale": 3}
    prompts = ["a dog", "a cat", "a bird"] * 2
    for k, (found, prompt) in enumerate(zip(result.settings, prompts, strict=True)):
        expected = settings | {"prompt": prompt, "seed": 7 + k, "init_img": "init.png"}
        assert found.items() >= expected.items()
    text = Image.open(result.paths[0]).text["parameters"]
    assert "Denoising strength: 0.5" in text


def test_the_originals_scale_is_5(img2img: Command) -> None:
    assert img2img().settings[0]["scale"] == 5.0


# --- strength


def round_trip(model: tuple[Path, Path], init: Path) -> np.ndarray:
    """The init image encoded to image 42's latents and decoded."""
    ldm = loading.load_model(loading.read_config(model[0]), model[1])
    posterior = ldm.encode_first_stage(to_float([np.asarray(Image.open(init))]))
    noise = ImageNoise([ImageSeeds(42)], (4, 3, 2), torch.device("cpu")).posterior()
    return to_uint8(ldm.decode_first_stage(ldm.get_first_stage_encoding(posterior, noise)))[0]


@pytest.mark.parametrize(("strength", "steps"), [(0, 4), (0.01, 50)])
def test_strength_0_is_the_autoencoders_round_trip(img2img, model, init, strength, steps) -> None:
    """The original returned a noised image."""
    result = img2img("--strength", strength, "--ddim_steps", steps)
    assert result.code == 0
    assert result.err == [f"img2img runs 0 of {steps} steps: the images are the autoencoder's round trip"]
    assert np.abs(result.images[0] - round_trip(model, init)).max() <= 1


@pytest.mark.parametrize(
    ("strength", "steps", "run"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.75, 50, 37)]
)
def test_steps_that_run(img2img, strength, steps, run) -> None:
    """The original truncated 0.29 * 100 to 28."""
    result = img2img("--strength", strength, "--ddim_steps", steps)
    assert (result.code, result.err) == (0, [f"img2img runs {run} of {steps} steps"])


@pytest.mark.parametrize("steps", [5, 27, 50])
def test_strength_1_is_text_to_image(img2img, txt2img, steps) -> None:
    """CompVis issue 200: the original's index ran out of the schedule."""
    result = img2img("--strength", 1, "--ddim_steps", steps)
    assert (result.code, result.err) == (0, [f"img2img runs {steps} of {steps} steps"])
    assert np.array_equal(result.images, txt2img("--ddim_steps", steps).images)


@pytest.mark.parametrize("sampler", catalogue.SAMPLERS)
def test_every_sampler_at_half_strength(img2img, txt2img, sampler) -> None:
    """The original's PLMS raised NotImplementedError after it had loaded the model."""
    result = img2img("--strength", 0.5, "--sampler", sampler)
    assert (result.code, result.err) == (0, ["img2img runs 2 of 4 steps"])
    assert result.images[0].shape == (24, 16, 3)
    assert result.images[0].std() > 1
    full = txt2img("--sampler", sampler)
    assert full.code == 0
    assert not np.array_equal(full.images, result.images)


def test_plms_by_its_flag(img2img) -> None:
    assert np.array_equal(img2img("--plms").images, img2img("--sampler", "plms", folder="named").images)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sampler", catalogue.SAMPLERS)
def test_every_sampler_on_few_steps(txt2img, sampler, steps) -> None:
    result = txt2img("--sampler", sampler, "--ddim_steps", steps, "--skip_grid")
    own = [f"--steps {steps}: dpm_adaptive chooses their number itself"] if sampler == "dpm_adaptive" else []
    assert (result.code, result.err, len(result.paths)) == (0, own, 1)


# --- noise


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_sde", "dpm_adaptive"])
def test_an_image_alone_is_the_image_of_a_run(img2img, sampler) -> None:
    run = img2img("--sampler", sampler, "--n_samples", 3, folder="run")
    alone = img2img("--sampler", sampler, "--seed", 44)
    assert np.abs(alone.images[0] - run.images[2]).max() <= 1
    assert np.abs(alone.images[0] - run.images[0]).max() > 1


@pytest.mark.parametrize("rng", ["image", "compvis"])
def test_fixed_code(img2img, rng) -> None:
    """The original took the flag and did nothing."""
    argv = ["--rng", rng, "--n_samples", 2, "--n_iter", 2, "--fixed_code"]
    a, b, c, _ = img2img(*argv, "--strength", 1, folder="fixed").images
    assert np.array_equal(a, c)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_sde"])
def test_a_variation_ends_at_both_seeds_exactly(img2img, sampler) -> None:
    argv = ["--sampler", sampler, "--n_samples", 2, "--variation_seed", 99, "--variation_strength"]
    first = img2img("--sampler", sampler, "--n_samples", 2, folder="first")
    second = img2img("--sampler", sampler, "--n_samples", 2, "--seed", 99, folder="second")
    assert np.array_equal(img2img(*argv, 0, folder="0").images, first.images)
    assert np.array_equal(img2img(*argv, 1, folder="1").images, second.images)
    between = img2img(*argv, 0.5, folder="half")
    assert not np.array_equal(between.images, first.images)
    found = [(s["seed"], s["variation_seed"], s["variation_strength"]) for s in between.settings]
    assert found == [(42, 99, 0.5), (43, 100, 0.5)]


# --- guidance and noise levels


def test_guidance_ends_leave_out_the_unconditional_half(txt2img, monkeypatch) -> None:
    from ldm.models.diffusion.ddpm import LatentDiffusion

    apply_model, rows = LatentDiffusion.apply_model, []

    def counted(self, x, t, cond):
        rows.append(len(x))
        return apply_model(self, x, t, cond)

    monkeypatch.setattr(LatentDiffusion, "apply_model", counted)
    argv = ["--ddim_steps", 10, "--guidance_start", 0.2, "--guidance_end", 0.5]
    assert txt2img(*argv).code == 0
    assert rows == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]


def test_cfg_rescale_changes_the_image(txt2img) -> None:
    plain = txt2img(folder="plain").images
    assert np.array_equal(txt2img("--cfg_rescale", 0, folder="zero").images, plain)
    assert not np.array_equal(txt2img("--cfg_rescale", 0.7).images, plain)


def test_own_timesteps_and_sigmas(txt2img) -> None:
    """The default grid, given as a list, makes the default image."""
    plain = txt2img(folder="plain").images
    assert np.array_equal(txt2img("--timesteps", "751,501,251,1", folder="t").images, plain)
    sigmas = txt2img("--sampler", "euler", "--schedule", "karras", folder="karras")
    listed = txt2img("--sampler", "euler", "--sigmas", "14.614641,3.168603,0.446918,0.029167,0", folder="s")
    assert np.abs(sigmas.images[0] - listed.images[0]).max() <= 1
    assert listed.settings[0]["steps"] == 4


def test_a_name_that_implies_a_schedule_sets_it(txt2img) -> None:
    named = txt2img("--sampler", "DPM++ 2M Karras", folder="named")
    plain = txt2img("--sampler", "dpmpp_2m", "--schedule", "karras")
    assert np.array_equal(named.images, plain.images)
    assert named.settings[0]["sampler"] == "dpmpp_2m"
    assert named.settings[0]["schedule"] == "karras"
    text = Image.open(named.paths[0]).text["parameters"]
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in text


def test_zero_snr_is_for_v_models(txt2img, tmp_path) -> None:
    v_model = tiny.write_config(tmp_path / "v.yaml", {"parameterization": "v"})
    result = txt2img("--config", v_model, "--zero_snr")
    assert (result.code, result.settings[0]["schedule"]) == (0, "trailing")
    assert not np.array_equal(result.images, txt2img("--config", v_model, folder="plain").images)
    refused(txt2img("--zero_snr", folder="eps"), "predicts the noise (eps)", "v-prediction models")


def test_the_watermark_is_on_by_default(img2img) -> None:
    """The original's img2img had none."""
    argv = ["--H", 256, "--W", 256, "--strength", 0.25]
    plain = img2img(*argv, folder="plain")
    marked = img2img(*argv, "--watermark", "StableDiffusionV1")
    assert ImageRequest().watermark == "StableDiffusionV1"
    assert 0 < np.abs(marked.images[0] - plain.images[0]).mean() < 8


def test_lines_bring_their_own_images(command, model, init, tmp_path):
    """The command asked for an --init-img, although each line named one."""
    argv = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--skip_grid", "--strength", 0.5]
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"prompt": "a cat", "init_img": str(init)}))
    result = command("img2img", *argv, "--from-file", path)
    assert result.code == 0
    assert [(s["init_img"], s["strength"]) for s in result.settings] == [(init.name, 0.5)] * len(result.paths)
    path.write_text(path.read_text() + "\n" + json.dumps({"prompt": "a cat", "seed": 1}))
    refused(command("img2img", *argv, "--from-file", path, folder="no"), "line 2: --init-img is missing")
    (tmp_path / "plain.txt").write_text("a cat")
    refused(
        command("img2img", *argv, "--from-file", tmp_path / "plain.txt", folder="no"), "--init-img is missing"
    )


# --- bad input, before any model is loaded


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--init-img", "--init-img is missing, or has no value"),
        ("--init-img nowhere.png", "nowhere.png"),
        ("--strength 1.01", "1.01 is not a number in range: 0 … 1"),
        ("--strength -0.1", "0 … 1"),
        ("--strength nan", "nan is not a number in range"),
        ("--sampler eulerr", "--sampler eulerr is not known; the nearest are euler, "),
        ("--sampler zzz", "none is near (--list_samplers shows all)"),
        ("--schedule karas", "--schedule karas is not known; the nearest"),
        ("--sampler plms --eta 0.5", "--eta 0.5: plms has no such option; it is one of ddim, "),
        ("--sampler ddim --s_churn 5", "--s_churn 5: ddim has no such option; it is one of euler, "),
        ("--sampler euler --ddim_eta 0.5", "--ddim_eta 0.5 with euler"),
        ("--ddim_eta 0.5 --eta 0.5", "--ddim_eta and --eta are one"),
        ("--timesteps 100,200", "--timesteps: the list must fall, but 200 comes after 100"),
        ("--timesteps 100,100", "must fall"),
        ("--timesteps 1000,1", "1000 is not a number in range: 0 … 999"),
        ("--timesteps 5,-1", "0 … 999"),
        ("--timesteps x", "x is not a number"),
        ("--timesteps ,", "at least 1 numbers are needed"),
        ("--sigmas 1", "at least 2 numbers"),
        ("--sigmas 1,0 --timesteps 5,4", "--timesteps and --sigmas all say which noise levels"),
        ("--sigmas 1,0 --schedule ays", "--schedule and --sigmas all say"),
        ("--sigmas 3,2,1,0 --ddim_steps 7", "--ddim_steps 7, but --sigmas makes 3 steps"),
        ("--sampler DPM++2MKarras --schedule ays", "implies the karras schedule and --schedule is ays"),
        ("--rho 5", "--rho 5 is for --schedule karras or polyexponential"),
        ("--variation_strength 0.5", "--variation_strength needs a --variation_seed, too"),
        ("--variation_seed 5", "--variation_seed needs a --variation_strength, too"),
        ("--variation_seed 5 --variation_strength 0.5 --rng compvis", "--variation_seed is for --rng image"),
        ("--guidance_start 0.5 --guidance_end 0.5", "is not below --guidance_end 0.5"),
        ("--cfg_rescale 2", "0 … 1"),
        ("--H 20", "--H 20 is not a multiple of 8; the nearest is 16"),
        ("--resize squeeze", "choose from"),
        ("--background nocolour", "nocolour"),
        ("--max_pixels 100", "384 pixels"),
    ],
)
@pytest.mark.usefixtures("weights_unread")
def test_bad_arguments(img2img, argv, words) -> None:
    refused(img2img(*argv.split()), words)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not an image</html>", b"\x89PNG\r\n\x1a\n" + bytes(40)],
    ids=["empty", "html", "broken"],
)
@pytest.mark.usefixtures("weights_unread")
def test_broken_init_images(img2img, tmp_path, data) -> None:
    (tmp_path / "bad.png").write_bytes(data)
    refused(img2img("--init-img", tmp_path / "bad.png"), "bad.png")


@pytest.mark.parametrize("flag", ["--C 5", "--f 16"])
def test_what_does_not_fit_the_model(img2img, flag) -> None:
    """The original read neither of these flags."""
    refused(img2img("--H", 32, "--W", 32, *flag.split()), f"{flag} does not fit this model")


# --- the bundled model

PROMPTED = Scene(Solid("cone", "yellow"), "on top of", Solid("cube", "green"), "grey")
SHOWN = Scene(Solid("cube", "red"), "left of", Solid("sphere", "blue"), "grey")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_the_bundled_model_keeps_the_image_or_follows_the_prompt(command, tmp_path) -> None:
    """At strength 0.3 the layout stays; at 0.9 the prompt wins."""
    Image.fromarray(render(SHOWN, np.random.default_rng(3), 128)).save(tmp_path / "scene.png")
    argv = [
        "--init-img",
        tmp_path / "scene.png",
        "--prompt",
        caption(PROMPTED),
        "--n_samples",
        1,
        "--scale",
        3,
    ]
    trip, weak, strong = (
        command("img2img", *argv, "--strength", strength, folder=str(strength)).images[0].astype(np.uint8)
        for strength in (0, 0.3, 0.9)
    )
    assert psnr(weak, trip) > psnr(strong, trip) + 1
    detector = load_detector(loading.find("models/scenes-64/detector.safetensors"))
    seen_trip, seen_weak, seen_strong = detector.read([trip, weak, strong])
    assert check(SHOWN, seen_trip)["all"]
    assert seen_weak.relation == SHOWN.relation
    assert check(PROMPTED, seen_strong)["all"]


def test_the_bundled_model_keeps_what_the_prompt_says(command, tmp_path) -> None:
    Image.fromarray(render(SHOWN, np.random.default_rng(3), 128)).save(tmp_path / "scene.png")
    argv = ["--init-img", tmp_path / "scene.png", "--prompt", caption(SHOWN), "--n_samples", 4, "--scale", 3]
    (trip, *_), images = (
        command("img2img", *argv, "--strength", strength, folder=str(strength)).images
        for strength in (0, 0.3)
    )
    assert min(psnr(image, trip) for image in images) > 20


def test_as_a_process_on_the_bundled_model(tmp_path: Path) -> None:
    """In an empty folder, and on an image larger than what the model was made for."""
    scene = render(SHOWN, np.random.default_rng(3), 128)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    argv = ["--init-img", "scene.png", "--ddim_steps", "5", "--n_samples", "1", "--prompt", "a red cube"]
    run = subprocess.run(
        [sys.executable, SCRIPTS / "img2img.py", *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "outputs/img2img-samples\n")
    assert "img2img runs 3 of 5 steps" in run.stderr
    (path,) = (tmp_path / "outputs/img2img-samples/samples").iterdir()
    assert Image.open(path).size == (128, 128)
    assert read_metadata(path)["strength"] == 0.75
