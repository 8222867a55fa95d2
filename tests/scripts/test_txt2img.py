"""`scripts/txt2img.py` from its arguments to its files, on a miniature of Stable Diffusion v1."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import SCRIPTS, Result, effective, lines, pixels, refused
from golden_files import case, golden_file
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.cli.arguments import gather, parse
from ldm.cli.parser import txt2img_parser
from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders import modules as encoders
from ldm.pipeline import pipeline
from ldm.pipeline.infotext import read_metadata
from ldm.pipeline.pipeline import SCALE
from ldm.pipeline.request import ImageRequest
from ldm.weights import loading
from ldm.weights.description import describe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/txt2img.py"
BUNDLED = ROOT / loading.BUNDLED_WEIGHTS

# Every flag of the original with its default; None is what the chosen model was made for.
ORIGINAL_FLAGS = {
    "--prompt": "a painting of a virus monster playing guitar",
    "--outdir": "outputs/txt2img-samples",
    "--skip_grid": False,
    "--skip_save": False,
    "--ddim_steps": 50,
    "--plms": False,
    "--dpm_solver": False,
    "--laion400m": False,
    "--fixed_code": False,
    "--ddim_eta": 0.0,
    "--n_iter": 2,
    "--H": None,
    "--W": None,
    "--C": None,
    "--f": None,
    "--n_samples": 3,
    "--n_rows": 0,
    "--scale": None,
    "--from-file": None,
    "--config": None,
    "--ckpt": None,
    "--seed": 42,
    "--precision": None,  # half on a GPU, full on a CPU
}


Txt2Img = Callable[..., Result]


@pytest.fixture
def txt2img(command, model) -> Txt2Img:
    """Run the command: two steps, one image of 16x16 pixels, no watermark, unless `argv` says otherwise."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 1, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def process(*argv: object, cwd: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--safety", "off", *map(str, argv)],
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- the original's images


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plms", "ddim_eta", "fromfile", "noguidance_fixed"])
def test_images_are_the_originals(txt2img, mini_v1, name):
    tensors, facts = case(f"txt2img_{name}")
    argv = json.loads(facts["args"])
    argv = [golden_file(arg) if arg.startswith("cases/") else arg for arg in argv]
    result = txt2img(
        "--rng", "compvis", "--config", golden_file("configs/mini-v1.yaml"), "--ckpt", mini_v1, *argv
    )
    assert result.code == 0
    assert [name.removeprefix("samples/") for name in result.files] == sorted(
        json.loads(facts["names"]), key=lambda name: not name.startswith("grid")
    )
    for k, image in enumerate(result.images):
        assert np.abs(image - tensors[f"image_{k}"].numpy()).max() <= 1


# --- flags


def test_every_flag_of_the_original_has_its_default():
    """None in the request is what the model was made for: for v1 512 pixels, and a scale of 7.5."""
    v1 = ROOT / loading.V1_CONFIG
    arguments = parse(txt2img_parser(), ["--config", str(v1)])
    found = {flag: effective(arguments, flag) for flag in ORIGINAL_FLAGS}
    assert found == ORIGINAL_FLAGS | {"--config": str(v1)}
    assert describe(loading.read_config(v1)).native_size == 512
    assert loading.advised_scale(v1, SCALE) == 7.5


def test_every_flag_of_the_original_is_taken(txt2img, tmp_path):
    """All of them in one command, but --laion400m. DPM-Solver wins over PLMS, --from-file over --prompt."""
    (tmp_path / "prompts.txt").write_text("a dog\n")
    flags = f"""--prompt x --skip_grid --skip_save --ddim_steps 3 --plms --dpm_solver --fixed_code
        --ddim_eta 0.5 --n_iter 1 --H 16 --W 24 --C 4 --f 8 --n_samples 2 --n_rows 1 --scale 3
        --from-file {tmp_path}/prompts.txt --seed 7 --precision full""".split()
    given = {flag for flag in flags if flag.startswith("--")}
    assert given == set(ORIGINAL_FLAGS) - {"--outdir", "--config", "--ckpt", "--laion400m"}
    result = txt2img(*flags)
    ignored = ["--ddim_eta 0.5 does nothing with --dpm_solver, as in the original"]
    ignored += ["--plms has no effect beside --dpm_solver, as in the original"]
    ignored += ["--n_rows has no effect with --skip_grid"]
    assert (result.code, result.err, result.files) == (0, ignored, [])

    saved = txt2img(*(flag for flag in flags if flag != "--skip_save"))
    settings = {"prompt": "a dog", "sampler": "dpmpp_2m", "steps": 3, "height": 16, "width": 24, "seed": 7}
    assert saved.settings[0].items() >= settings.items()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--ddim_steps", "0"], 2),
        (["--plms", "--ddim_eta", "0.5"], 2),
        (["--laion400m", "--config", "other.yaml"], 2),
        (["--config", "nowhere.yaml"], 2),
        (["--H", "510"], 2),
        (["--from-file", "nowhere.txt"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_help_and_argument_errors_do_not_wait_for_torch(tmp_path, argv, code):
    """Also on a terminal of another encoding: the help has plain letters only."""
    watch = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]; "
        "atexit.register(lambda: print({'torch', 'cv2', 'transformers'} & {*sys.modules})); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", watch, SCRIPT, *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        encoding="latin-1",
    )
    assert run.returncode == code
    assert run.stdout.splitlines()[-1] == "set()"
    assert len(run.stderr.splitlines()) == (code == 2)
    assert run.stderr.startswith("txt2img.py: error: " if code else "")
    assert list(tmp_path.iterdir()) == []


# --- bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--H 510", "--H 510 is not a multiple of 8; the nearest is 512"),
        ("--W 99", "--W 99 is not a multiple of 8; the nearest is 96"),
        ("--H 4", "8 … 65,536"),
        ("--H -64", "8 … 65,536"),
        ("--ddim_steps 0", "0 is not a whole number in range: 1 … 1,000"),
        ("--ddim_steps 1001", "1 … 1,000"),
        ("--ddim_steps abc", "1 … 1,000"),
        ("--ddim_steps 2.5", "1 … 1,000"),
        ("--scale nan", "nan is not a number in range"),
        ("--scale inf", "inf is not a number in range"),
        ("--ddim_eta -1", "0 … 1"),
        ("--ddim_eta 2", "0 … 1"),
        ("--seed -2", "-1 … 9,223,372,036,854,775,807"),
        ("--seed 9223372036854775808", "-1 … 9,223,372,036,854,775,807"),
        ("--n_samples 0", "at least 1"),
        ("--n_iter 0", "at least 1"),
        ("--ddim_steps 50 --timesteps 999,500,1", "--ddim_steps 50, but --timesteps makes 3 steps; give one"),
        ("--compile --eager", "--compile and --eager exclude each other; give one of them"),
        ("--ddim_eta 0.5 --plms", "--ddim_eta 0.5 with PLMS"),
        ("--ddim_eta 0.5 --sampler plms", "--ddim_eta 0.5 with PLMS"),
        ("--sampler ddim --plms", "--sampler ddim and --plms name different samplers"),
        ("--sampler plms --dpm_solver", "--sampler plms and --dpm_solver name different samplers"),
        ("--sampler eulerr", "the nearest are euler, euler_ancestral"),
        ("--prompt", "--prompt is missing, or has no value"),
        ("--outdir", "--outdir is missing, or has no value"),
        ("--schedule=", "--schedule is missing, or has no value"),
        ("--like=", "--like is missing, or has no value"),
        ("--laion400m", "name different models; give one"),
        ("--no_such_flag", "--no_such_flag"),
        ("--seed 1\n2", "1 2"),
    ],
)
def test_arguments_out_of_range(txt2img, argv, words):
    """50 steps beside a list of three ran three, and --eager won over --compile, both without a word."""
    result = txt2img(*argv.split(" "))
    refused(result, words)
    assert not result.folder.exists()


def test_another_autoencoder(
    txt2img: Callable[..., Result], model: tuple[Path, Path], tmp_path: Path
) -> None:
    """It decodes, its name and hash are recorded, and --like and --resume ask for it."""
    state = load_file(model[1])
    vae = {
        name.removeprefix("first_stage_model."): t + 0.1 * (name == "first_stage_model.decoder.conv_out.bias")
        for name, t in state.items()
        if name.startswith("first_stage_model.")
    }
    save_file(vae, tmp_path / "vae.safetensors")
    whole = state | {f"first_stage_model.{name}": t for name, t in vae.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    words = ("--n_samples", 1, "--n_iter", 1, "--steps", 1)
    plain = txt2img(*words, folder="plain")
    other = txt2img(*words, "--vae", tmp_path / "vae.safetensors")
    same = txt2img(*words, "--ckpt", tmp_path / "whole.safetensors", folder="whole")
    assert np.array_equal(other.images, same.images)
    assert not np.array_equal(other.images, plain.images)
    digest = hashlib.sha256((tmp_path / "vae.safetensors").read_bytes()).hexdigest()[:10]
    assert (other.settings[0]["vae"], other.settings[0]["vae_hash"]) == ("vae.safetensors", digest)
    again = txt2img("--like", other.paths[0], folder="again")
    refused(again, "its autoencoder was vae.safetensors; give that as --vae")
    assert "vae" in txt2img(*words, "--resume").err[-1]
    narrow = {name: t[:, :, :1] if t.ndim == 4 else t for name, t in vae.items()}
    save_file({k: t.contiguous() for k, t in narrow.items()}, tmp_path / "narrow.safetensors")
    refused(
        txt2img(*words, "--vae", tmp_path / "narrow.safetensors", folder="narrow"), "does not fit the model"
    )


def test_laion400m_finds_its_own_files(
    command: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of 256x256 pixels, where the original looked for it; another --outdir was ignored."""
    monkeypatch.chdir(tmp_path)
    refused(command("txt2img", "--laion400m"), "no checkpoint at", "models/ldm/text2img-large/model.ckpt")
    given = vars(txt2img_parser().parse_args(["--laion400m"]))
    found = gather(txt2img_parser(), given)
    assert describe(found.config).native_size == 256
    assert found.run.outdir == "outputs/txt2img-samples-laion400m"
    assert gather(txt2img_parser(), given | {"outdir": "mine"}).run.outdir == "mine"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "No such file"),
        (b" \n\n", "no prompt in it"),
        ("a café".encode("latin-1"), "line 1 holds the byte 0xe9, which is not UTF-8"),
    ],
    ids=["missing", "empty", "latin-1"],
)
def test_prompt_files_that_cannot_be_used(txt2img, tmp_path, data, words):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    refused(txt2img("--from-file", path), f"--from-file {path}: ", words)


def test_an_output_folder_that_cannot_be_written(txt2img, tmp_path, monkeypatch):
    """Known before the model loads."""
    monkeypatch.setattr(pipeline, "load_model", None)
    (tmp_path / "file").write_text("mine")
    result = txt2img("--outdir", tmp_path / "file/below")
    refused(result, "cannot write to", "file/below", "choose another folder")
    assert (tmp_path / "file").read_text() == "mine"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def write_v2(path: Path) -> None:
    """What distinguishes a v2 checkpoint from others: its UNet's input channels and the width of its text."""
    tensors = {
        "0.0.weight": torch.zeros(8, 4, 3, 3),
        "1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 1024),
    }
    save_file({f"model.diffusion_model.input_blocks.{name}": t for name, t in tensors.items()}, path)


def write_bad_checkpoint(kind: str, path: Path, weights: Path) -> None:
    whole = weights.read_bytes()
    match kind:
        case "empty":
            path.touch()
        case "cut short":
            path.write_bytes(whole[: len(whole) // 2])
        case "cut short .ckpt":
            torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
            path.write_bytes(path.read_bytes()[:2000])
        case "HTML":
            path.write_text("<!DOCTYPE html>\n<html><title>Sign in</title></html>")
        case "LFS":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n")
        case "code":
            torch.save({"state_dict": {"a": torch.zeros(3)}, "callback": Evil(path.with_name("run"))}, path)
        case "Stable Diffusion v2":
            write_v2(path)
        case "line\nend":
            path.touch()


@pytest.mark.parametrize("name", ["txt2img", "walk", "compare"])
def test_a_missing_checkpoint_is_refused_before_torch_is_imported(name, model):
    """With --config it was looked for only by what reads it, a second and a half later."""
    own = {"walk": ["--prompts", "a", "b"], "compare": ["--x", "steps", "1", "--y", "scale", "1"]}
    argv = [*own.get(name, []), "--config", str(model[0]), "--ckpt", "nowhere.ckpt"]
    code = f"import sys; sys.path[:0] = [{str(SCRIPTS)!r}]; import {name}; from ldm.cli import entry\n"
    code += f"code = entry.run({name}.main, {argv}); sys.exit(99 if 'torch' in sys.modules else code)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: no checkpoint at" in ended.stderr


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no checkpoint at"),
        ("empty", "is empty"),
        ("cut short", "is cut short"),
        ("cut short .ckpt", "is cut short"),
        ("HTML", "is a web page"),
        ("LFS", "run `git lfs pull`"),
        ("code", "carries code: its pickle calls"),
        ("Stable Diffusion v2", "looks like Stable Diffusion v2 (its config is v2-inference.yaml"),
        ("line\nend", "is empty"),
    ],
)
def test_checkpoints_that_cannot_be_used(txt2img, model, tmp_path, kind, words):
    path = tmp_path / f"{kind}.ckpt"
    write_bad_checkpoint(kind, path, model[1])
    refused(txt2img("--ckpt", path), words, path.name.replace("\n", " "))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_family_in_any_folder(txt2img, model, tmp_path, monkeypatch):
    """Paths are those of the working folder first, then the repository's."""
    (tmp_path / "mine.safetensors").symlink_to(model[1])
    monkeypatch.chdir(tmp_path)
    result = txt2img("--config", "configs/stable-diffusion/v1-inference.yaml", "--ckpt", "mine.safetensors")
    words = "mine.safetensors looks like a latent diffusion model of an unlisted kind"
    refused(result, words, "the model is Stable Diffusion v1: ")


def test_weights_that_the_file_lacks(txt2img):
    refused(txt2img("--weights", "ema"), "has no EMA weights: use --weights raw")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("", "has no model: section"),
        ("42", "Invalid loaded object type: int"),
        ("model: [", "is not valid YAML"),
        ("\0\1\2", "is not valid YAML"),
        ("model: !!int big", "is not valid YAML"),
        ("model: ${nothing}", "is not valid YAML"),
        ("other: {}", "has no model: section"),
        ("model: {params: {}}", "has no target"),
        ("model: {target: ldm.util.nothing, params: [1]}", "does not describe a latent diffusion model"),
        ("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}", "missing 3 required"),
        ("model: {target: [1], params: {}}", "cannot be built"),
        ("model: {target: torch.nn.Identity}", "the config's model is Identity, not a LatentDiffusion"),
    ],
)
def test_configs_that_cannot_be_read(txt2img, tmp_path, text, words):
    path = tmp_path / "model.yaml"
    if text is not None:
        path.write_text(text)
    refused(txt2img("--config", path), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet_config.target": "ldm.nothing.UNetModel"}, "'ldm.nothing.UNetModel' does not exist"),
        ({"unet_config.target": "ldm.util.UNetModel"}, "'ldm.util.UNetModel' does not exist"),
        ({"unet_config.target": "ldm.util.get_obj_from_str"}, "is not a class of the model"),
        ({"cond_stage_config.target": "os.system"}, "config target 'os.system' is not allowed"),
        ({"cond_stage_config.target": "ldmx.Encoder"}, "config target 'ldmx.Encoder' is not allowed"),
        ({"unet_config.params.model_chanels": 32}, "'model_chanels'; did you mean 'model_channels'?"),
        ({"first_stage_config.params.ddconfig.chn": 32}, "'chn'; did you mean 'ch'?"),
        ({"image_sise": 8}, "'image_sise'; did you mean 'image_size'?"),
        ({"image_size": "big"}, "the config does not describe a latent diffusion model"),
        ({"unet_config.params.num_heads": "two"}, "the config's model cannot be built"),
        ({"unet_config.params.model_channels": 33}, "the config's model cannot be built"),
    ],
)
def test_configs_that_describe_no_model(txt2img, tmp_path, changes, words):
    refused(txt2img("--config", tiny.write_config(tmp_path / "model.yaml", changes)), words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--C", 3], "--C 3 does not fit this model: its value is 4"),
        (["--f", 4], "--f 4 does not fit this model: its value is 8"),
        (["--device", "cuda:99"], "--device cuda:99 is not there; this machine has "),
        (["--device", "toaster"], "--device toaster is not there; this machine has "),
    ],
)
def test_arguments_that_do_not_fit_model_or_machine(txt2img, argv, words):
    refused(txt2img(*argv), words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(txt2img):
    refused(txt2img("--device", "cuda"), "--device cuda is not there; this machine has ")


def test_debug_shows_where_an_error_comes_from(txt2img):
    with pytest.raises(InputError, match="no checkpoint at"):
        txt2img("--ckpt", "nowhere.ckpt", "--debug")


def test_unexpected_errors_are_one_line_too(txt2img, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", fail)
    result = txt2img()
    assert (result.code, result.err) == (1, ["txt2img.py: RuntimeError: out of memory (--debug shows where)"])
    with pytest.raises(RuntimeError):
        txt2img("--debug")


def test_an_interrupted_run_keeps_what_it_has(txt2img, monkeypatch):
    decode, calls = LatentDiffusion.decode_first_stage, []

    def interrupted(self, latents):
        calls.append(latents)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", interrupted)
    result = txt2img("--n_iter", 3)
    assert (result.code, result.files) == (130, ["samples/00000.png"])
    assert result.err == ["txt2img.py: interrupted; the images that were finished are saved"]


def test_prompts_longer_than_the_encoder_reads(txt2img):
    """The words that are cut off are shown; the original dropped them in silence."""
    prompt = " ".join(["cat"] * 75 + ["on", "a", "mat"])
    result = txt2img("--prompt", prompt, "--n_samples", 2, "--negative_prompt", " ".join(["dog"] * 76))
    assert result.code == 0
    assert [line.partition("; ")[2] for line in result.err] == ["cut off: 'on a mat'", "cut off: 'dog'"]
    assert len(result.images) == 2
    assert txt2img("--prompt", " ".join(["cat"] * 75)).err == []


def test_nan_costs_one_image_only(txt2img, monkeypatch):
    decode = LatentDiffusion.decode_first_stage

    def broken(self, latents):
        latents = latents.clone()
        latents[1, 0, 0, 0] = torch.nan
        return decode(self, latents)

    plain = txt2img("--n_samples", 3, folder="plain")
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", broken)
    result = txt2img("--n_samples", 3)
    assert result.code == 1
    skipped = "image 1 ('a cat') came out as NaN and is skipped"
    assert result.err == [skipped, "1 of 3 images failed: manifest.jsonl says which"]
    assert result.out == [str(result.folder)]
    assert result.files == ["grid-0000.png", "samples/00000.png", "samples/00002.png"]
    assert [settings["image"] for settings in result.settings] == [0, 2]
    for image, expected in zip(result.images, (plain.images[0], plain.images[2]), strict=True):
        assert np.abs(image - expected).max() <= 1


# --- files


def test_files_and_grid(txt2img):
    result = txt2img("--n_iter", 2, "--n_samples", 3, "--H", 16, "--W", 24)
    assert (result.code, result.err) == (0, [])
    assert result.out == [str(result.folder)]
    assert result.files == ["grid-0000.png", *(f"samples/{k:05d}.png" for k in range(6))]
    assert all(image.shape == (16, 24, 3) for image in result.images)
    assert len({image.tobytes() for image in result.images}) == 6

    grid = pixels(result.folder / "grid-0000.png")
    assert grid.shape == (2 * 18 + 2, 3 * 26 + 2, 3)
    for k, image in enumerate(result.images):
        top, left = k // 3 * 18 + 2, k % 3 * 26 + 2
        assert np.array_equal(grid[top : top + 16, left : left + 24], image)


def test_n_rows_is_the_number_of_columns(txt2img):
    """As in the original, whatever its name says."""
    result = txt2img("--n_samples", 3, "--n_rows", 2)
    assert pixels(result.folder / "grid-0000.png").shape == (2 * 18 + 2, 2 * 18 + 2, 3)


def test_what_is_skipped_is_not_saved(txt2img):
    assert txt2img("--skip_grid", folder="a").files == ["samples/00000.png"]
    assert txt2img("--skip_save", folder="b").files == ["grid-0000.png"]


def test_later_runs_never_overwrite(txt2img):
    """The original counted files: with an early one deleted, it wrote over the last one."""
    result = txt2img("--n_samples", 3)
    (result.folder / "samples/00000.png").unlink()
    before = {path: path.read_bytes() for path in [*result.paths, result.folder / "grid-0000.png"]}
    result = txt2img("--n_samples", 2, "--seed", 7)
    assert result.files == ["grid-0000.png", "grid-0001.png", *(f"samples/0000{k}.png" for k in (1, 2, 3, 4))]
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_reader_that_ends_early(model, tmp_path):
    """`--json | head -1` ended with a traceback of BrokenPipeError."""
    argv = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 1, "--n_iter", 40, "--n_samples", 1]
    run = process(*argv, "--json", "--quiet", "--outdir", "out", cwd=tmp_path)
    assert json.loads(run.stdout.readline())["image"] == 0
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 128 + 13


def test_two_runs_at_once_lose_nothing(model, tmp_path):
    config, weights = model
    argv = ["--outdir", tmp_path / "out", "--config", config, "--ckpt", weights, "--ddim_steps", 2]
    argv += ["--n_iter", 4, "--n_samples", 2, "--prompt"]
    runs = [process(*argv, prompt, cwd=tmp_path) for prompt in ("a cat", "a dog")]
    for run in runs:
        out, err = run.communicate()
        assert (run.returncode, out) == (0, f"{tmp_path / 'out'}\n")
        assert lines(err) == ["No watermark: it needs 256x256 pixels and these images have 16x16"]
        assert re.search(r"8 images: 100%.* images/s", err)
    paths = sorted((tmp_path / "out/samples").iterdir())
    assert [path.name for path in paths] == [f"{k:05d}.png" for k in range(16)]
    found = sorted((read_metadata(path)["prompt"], read_metadata(path)["image"]) for path in paths)
    assert found == [(prompt, k) for prompt in ("a cat", "a dog") for k in range(8)]
    assert len(list((tmp_path / "out").glob("grid-*.png"))) == 2


def test_the_watermark_is_on_by_default(txt2img):
    """Sample and grid have it; the one notice is for sizes at which it cannot be written."""
    argv = ["--H", 256, "--W", 256, "--ddim_steps", 1]
    plain = txt2img(*argv, folder="plain")
    marked = txt2img(*argv, "--watermark", "StableDiffusionV1")
    assert ImageRequest().watermark == "StableDiffusionV1"
    assert marked.err == []
    assert 0 < np.abs(marked.images[0] - plain.images[0]).mean() < 8
    assert np.array_equal(pixels(marked.folder / "grid-0000.png"), marked.images[0])
    assert len(txt2img("--watermark", "StableDiffusionV1").err) == 1


def test_an_empty_watermark(txt2img):
    """Every image failed when it was to be written, with exit code 1."""
    refused(txt2img("--watermark="), "the watermark's message is empty; give one, or use --watermark none")


def test_an_empty_sampler_or_file_is_as_none(txt2img):
    """As `--sampler="$SAMPLER"` leaves it where the variable is empty; as the original did."""
    result = txt2img("--sampler=", "--from-file=")
    assert (result.code, result.settings[0]["sampler"], result.settings[0]["prompt"]) == (0, "ddim", "a cat")


def test_a_missing_watermark_package(txt2img, monkeypatch):
    """It ended runs whose images are too small for a mark; others should end before the model loads."""
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    mark = ["--watermark", "a mark that no other test writes"]
    small = txt2img(*mark, folder="small")
    assert (small.code, small.files) == (0, ["grid-0000.png", "samples/00000.png"])
    monkeypatch.setattr(pipeline, "load_model", None)
    large = txt2img(*mark, "--H", 256, "--W", 256, folder="large")
    refused(
        large, "the watermark cannot be written", "`pip install invisible-watermark opencv-python-headless`"
    )


def test_settings_are_in_the_files(txt2img, model):
    result = txt2img("--n_iter", 2, "--n_samples", 2, "--seed", 5, "--scale", 4, "--negative_prompt", "a dog")
    settings = {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "sampler": "ddim",
        "steps": 2,
        "scale": 4,
        "eta": 0,
        "height": 16,
        "width": 16,
        "rng": "image",
        "n_samples": 2,
        "checkpoint": model[1].name,
        "config": model[0].name,
    }
    for k, found in enumerate(result.settings):
        assert found.items() >= (settings | {"seed": 5 + k, "image": k}).items()
    assert read_metadata(result.folder / "grid-0000.png").items() >= (settings | {"seed": 5}).items()
    text = Image.open(result.paths[1]).text["parameters"]
    assert text.startswith(
        "a cat\nNegative prompt: a dog\nSteps: 2, Sampler: DDIM, CFG scale: 4.0, Seed: 6, "
    )


def test_the_model_is_in_the_files(txt2img, model, tmp_path):
    """The hash was of another kind than today's tools write, and `weights` null unless it was given."""
    (found,) = txt2img(folder="raw").settings
    assert found["model_hash"] == hashlib.sha256(model[1].read_bytes()).hexdigest()[:10]
    assert found["weights"] == "raw"

    averaged = load_file(model[1])
    for name in [name for name in averaged if name.startswith("model.diffusion_model.")]:
        averaged[f"model_ema.{name.removeprefix('model.').replace('.', '')}"] = averaged[name] * 0.9
    save_file(averaged, tmp_path / "ema.safetensors")
    config = tiny.write_config(tmp_path / "ema.yaml", {"use_ema": True})
    (found,) = txt2img("--ckpt", tmp_path / "ema.safetensors", "--config", config, folder="ema").settings
    assert found["weights"] == "ema"


def test_the_originals_stream_has_one_seed(txt2img):
    """`--seed seed+k` does not make image k of such a run, so its file does not say so."""
    result = txt2img("--n_samples", 2, "--rng", "compvis")
    assert [(found["seed"], found["image"]) for found in result.settings] == [(42, 0), (42, 1)]


def test_no_metadata(txt2img):
    result = txt2img("--no_metadata")
    for path in (*result.paths, result.folder / "grid-0000.png"):
        assert set(Image.open(path).text) == {"XML:com.adobe.xmp"}  # that it is generated, and nothing else


# --- images


def test_a_prompt_file_whose_last_batch_is_smaller(txt2img, tmp_path):
    """CompVis issue 12: the original crashed there and lost the grid."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\na dog\r\na café\r\n".encode())
    result = txt2img("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--n_iter", 2)
    assert (result.code, result.err) == (0, [])
    prompts = ["a cat", "a dog", "a café"] * 2
    found = [(settings["prompt"], settings["seed"]) for settings in result.settings]
    assert found == list(zip(prompts, range(42, 48), strict=True))
    assert pixels(result.folder / "grid-0000.png").shape == (3 * 18 + 2, 2 * 18 + 2, 3)


@pytest.mark.parametrize("sampler", ["--ddim_eta 0.7", "--plms", "--dpm_solver"])
def test_image_k_alone_is_image_k_of_a_run(txt2img, sampler):
    argv = [*sampler.split(), "--ddim_steps", 5]
    run = txt2img(*argv, "--n_samples", 3, "--n_iter", 2, folder="run")
    for k in (1, 5):
        (alone,) = txt2img(*argv, "--seed", 42 + k, folder=f"alone{k}").images
        assert np.abs(alone - run.images[k]).max() <= 1
        assert np.abs(alone - run.images[0]).max() > 3


@pytest.mark.parametrize("rng", ["image", "compvis"])
def test_fixed_code(txt2img, rng):
    argv = ["--rng", rng, "--n_samples", 2, "--n_iter", 2]
    a, b, c, d = txt2img(*argv, "--fixed_code", folder="fixed").images
    assert np.array_equal(a, c)
    assert np.array_equal(b, d)
    assert not np.array_equal(a, b)
    a, b, c, d = txt2img(*argv, folder="free").images
    assert not np.array_equal(a, c)


def test_a_seed_of_its_own_choice(txt2img):
    chosen = txt2img("--seed", -1, "--n_samples", 2, folder="chosen")
    assert len(chosen.err) == 1
    seed = int(chosen.err[0].removeprefix("seed "))
    assert [found["seed"] for found in chosen.settings] == [seed, seed + 1]
    again = txt2img("--seed", seed, "--n_samples", 2, folder="again")
    assert np.array_equal(chosen.images, again.images)
    assert txt2img("--seed", -1, folder="other").err != chosen.err


def test_the_largest_seed(txt2img):
    result = txt2img("--seed", 2**63 - 1, "--n_samples", 2)
    assert [found["seed"] for found in result.settings] == [2**63 - 1, 0]
    assert txt2img("--seed", 2**63 - 1, "--rng", "compvis", folder="compvis").code == 0


def test_a_negative_prompt_without_guidance(txt2img):
    """It does nothing at scale 1, which nobody said."""
    line = "--negative_prompt does nothing at --scale 1, which samples without guidance"
    assert txt2img("--scale", 1, "--negative_prompt", "a dog", "--n_samples", 2, folder="1").err == [line]
    assert txt2img("--scale", 2, "--negative_prompt", "a dog").err == []


def test_prompt_scale_and_negative_prompt_matter(txt2img):
    variants = [
        [],
        ["--prompt", "a dog"],
        ["--scale", 1],
        ["--scale", 0],
        ["--negative_prompt", "a dog"],
        ["--scale", 1, "--negative_prompt", "a dog"],
    ]
    images = [txt2img(*argv, folder=str(i)).images[0].tobytes() for i, argv in enumerate(variants)]
    assert len(set(images)) == len(variants) - 1
    assert images[2] == images[5]  # without guidance there is nothing to steer away from


def test_a_config_may_advise_a_scale(txt2img, model, tmp_path):
    assert txt2img(folder="default").settings[0]["scale"] == 7.5
    config = tmp_path / "model.yaml"
    config.write_text(json.dumps(json.loads(model[0].read_text()) | {"sampling": {"scale": 2}}))
    assert txt2img("--config", config, folder="advised").settings[0]["scale"] == 2
    assert txt2img("--config", config, "--scale", 3, folder="given").settings[0]["scale"] == 3
    config.write_text(json.dumps(json.loads(model[0].read_text()) | {"sampling": {"scale": "high"}}))
    refused(txt2img("--config", config, folder="bad"), "scale 'high'", "not a number")


def test_precision_is_full_on_a_cpu(txt2img):
    runs = [txt2img("--precision", name, "--device", "cpu", folder=name) for name in ("full", "autocast")]
    assert np.array_equal(runs[0].images, runs[1].images)


@pytest.mark.parametrize(("height", "width"), [(72, 104), (8, 8), (8, 24)])
def test_any_multiple_of_8_is_a_size(txt2img, height, width):
    """The original's UNet failed unless both were multiples of 64."""
    result = txt2img("--H", height, "--W", width, "--plms")
    assert (result.code, result.images[0].shape) == (0, (height, width, 3))


def test_a_side_that_a_format_cannot_hold_is_refused_before_sampling(txt2img):
    """All images of a run were sampled, and each of them was lost when it was to be saved."""
    refused(txt2img("--W", 16392, "--H", 8, "--format", "webp"), "16,383 at most; use --format png")


def test_formats_of_a_checkpoint(txt2img, model, tmp_path):
    """The weights are equal; where they lie in memory decides the order of sums, hence the last bit."""
    state = load_file(model[1])
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "tiny.ckpt")
    save_file({name: t.half() for name, t in state.items()}, tmp_path / "half.safetensors")
    (plain,) = txt2img(folder="plain").images
    (pickled,) = txt2img("--ckpt", tmp_path / "tiny.ckpt", folder="ckpt").images
    (half,) = txt2img("--ckpt", tmp_path / "half.safetensors", folder="half").images
    assert np.abs(plain - pickled).max() <= 1
    config = loading.read_config(model[0])
    weights = [loading.load_model(config, path).state_dict() for path in (model[1], tmp_path / "tiny.ckpt")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert np.abs(plain - half).mean() < 2


# --- work


@pytest.mark.parametrize(
    ("argv", "calls", "size"),
    [
        (["--sampler", "ddim"], 7, 4),
        (["--ddim_eta", 1], 7, 4),
        (["--plms"], 8, 4),
        (["--dpm_solver"], 7, 4),
        (["--plms", "--scale", 1], 8, 2),
        (["--scale", 0], 7, 4),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_model_calls(txt2img, monkeypatch, argv, calls, size):
    """N for N steps, N + 1 for PLMS; guidance takes no call more. The original took 8 steps of DDIM for 7."""
    forward, sizes = UNetModel.forward, []

    def counted(self, x, *args, **kwargs):
        sizes.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", counted)
    assert txt2img(*argv, "--ddim_steps", 7, "--n_samples", 2, "--n_iter", 2).code == 0
    assert sizes == [size] * (2 * calls)


def test_a_text_is_encoded_once(txt2img, tmp_path, monkeypatch):
    """The original encoded the empty prompt again for every batch."""
    encode, texts = encoders.FrozenCLIPEmbedder.encode, []

    def counted(self, batch):
        texts.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(encoders.FrozenCLIPEmbedder, "encode", counted)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    assert txt2img("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--n_iter", 3).code == 0
    assert sorted(texts) == ["", "a cat", "a dog"]


# --- which model


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """An empty one, so that weights linked in this one do not matter, and a working folder elsewhere."""
    (tmp_path / "repository/models/ldm/stable-diffusion-v1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(loading, "ROOT", tmp_path / "repository")
    return tmp_path / "repository"


@pytest.mark.parametrize("link", loading.V1_WEIGHTS)
def test_linked_weights_are_the_default(repository, model, link):
    (repository / link).symlink_to(model[1])
    v1 = loading.ModelFiles(repository / loading.V1_CONFIG, repository / link)
    assert loading.choose_model(None, None) == v1
    assert loading.choose_model(loading.V1_CONFIG, None) == v1
    with pytest.raises(InputError, match="of an unlisted kind: give its config with --config"):
        loading.choose_model(None, str(model[1]))
    assert loading.choose_model(loading.BUNDLED_CONFIG, None).weights == repository / loading.BUNDLED_WEIGHTS


def test_a_link_to_nowhere_is_not_taken_for_no_link(repository):
    """Weights on a disk that is not mounted must not turn into images of the bundled model."""
    link = repository / loading.V1_WEIGHTS[0]
    link.symlink_to("/nowhere/sd-v1-4.ckpt")
    assert loading.choose_model(None, None).weights == link


def test_without_weights_the_bundled_model_runs(repository):
    files = loading.choose_model(None, None)
    assert files.config == repository / loading.BUNDLED_CONFIG
    assert files.weights == repository / loading.BUNDLED_WEIGHTS
    assert files.notice.startswith("No weights are linked at models/ldm/stable-diffusion-v1/model.ckpt")
    assert "ln -s" in files.notice
    assert "\n" not in files.notice


@pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled model is not there yet")
@pytest.mark.skipif(
    any((ROOT / path).exists() for path in loading.V1_WEIGHTS), reason="real weights are linked"
)
def test_the_bundled_model_in_any_folder(tmp_path):
    run = process("--prompt", "a red cube", "--plms", "--ddim_steps", 5, "--n_iter", 1, cwd=tmp_path)
    out, err = run.communicate()
    assert (run.returncode, out) == (0, "outputs/txt2img-samples\n")
    watermark, weights = lines(err)
    assert watermark.startswith("No watermark: ")
    assert weights.startswith("No weights are linked at ")
    images = [pixels(path) for path in sorted((tmp_path / out.strip() / "samples").iterdir())]
    assert [image.shape for image in images] == [(128, 128, 3)] * 3


def test_a_package_of_the_users_own(txt2img, tmp_path, monkeypatch):
    (tmp_path / "my_lab.py").write_text(
        "from torch import nn\n"
        "from ldm.modules.encoders.modules import FrozenCLIPEmbedder\n"
        "class Encoder(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = [FrozenCLIPEmbedder(width=32, layers=1, heads=2)]\n"
        "        self.transformer = self.inner[0].transformer\n"
        "    def encode(self, texts):\n"
        "        return self.inner[0].encode(texts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"cond_stage_config.target": "my_lab.Encoder", "cond_stage_config.params": {}}
    config = tiny.write_config(tmp_path / "model.yaml", changes)
    refused(txt2img("--config", config), "config target 'my_lab.Encoder' is not allowed", "--allow_target")
    mine = txt2img("--config", config, "--allow_target", "my_lab")
    assert (mine.code, mine.err) == (0, [])
    assert np.array_equal(mine.images, txt2img(folder="plain").images)
