import functools
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_siblings
import torch
from commands import lines, script
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import write_config

from ldm.cli import entry
from ldm.errors import InputError
from ldm.modules.encoders import modules as encoders
from ldm.training.finetune.methods import METHODS, Control
from ldm.training.finetune.setup import new_task, prepare
from ldm.weights.checkpoint import read_state_dict

Finetune = Callable[..., SimpleNamespace]
CLIPTokenizer = functools.cache(encoders.CLIPTokenizer)  # it takes longer to make than to train


def write_images(folder: Path) -> Path:
    """Three images, one of them with a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{k}.png")
    (folder / "0.txt").write_text("a zqx cube on the left\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def run(model: tuple[Path, Path], data: Path | None, output: Path, *words: Any) -> SimpleNamespace:
    """scripts/finetune.py on the miniature of tiny.py."""
    config, ckpt = model
    plain = ["--config", config, "--ckpt", ckpt, "--output", output, "--steps", 4]
    plain += [] if data is None else ["--data", data]
    plain += ["--batch_size", 2, "--precision", "full", "training.sample_steps=2", "training.logs=[csv]"]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "CLIPTokenizer", CLIPTokenizer)
        try:
            code = entry.run(script("finetune").main, [str(word) for word in (*words, *plain)])
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(
        code=code, out=out.getvalue().splitlines(), err=lines(err.getvalue()), output=output
    )


@pytest.fixture
def finetune(model: tuple[Path, Path], folder: Path, tmp_path: Path) -> Finetune:
    """`run` on the images of `folder`; its output is in `tmp_path`/out."""

    def call(
        *words: Any, data: Path | None = folder, output: Path = tmp_path / "out" / "zqx.safetensors"
    ) -> SimpleNamespace:
        return run(model, data, output, *words)

    return call


@pytest.fixture(scope="module")
def lora(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An undisturbed run that makes a LoRA."""
    own = tmp_path_factory.mktemp("lora")
    return run(model, write_images(own / "images"), own / "out" / "zqx.safetensors", *LORA_OF_TWO)


def refused(result: SimpleNamespace, *words: str) -> None:
    assert result.code == 2
    assert len(result.err) == 1
    assert all(word in result.err[0] for word in words), result.err[0]
    assert not result.output.exists()


LORA = ("--method", "lora", "--prompt", "a zqx cube")
LORA_OF_TWO = (*LORA, "--rank", 2, "--text_encoder", "--learning_rate", 0.05)


def test_a_lora_is_made_sampled_and_read_by_txt2img(
    lora: SimpleNamespace, command: Callable, model: tuple
) -> None:
    result = lora
    assert result.code == 0
    assert result.out == [str(result.output), str(result.output.with_suffix("") / "before-after.png")]
    plan = next(line for line in result.err if "trained parameters" in line)
    assert "3 images" in plan
    assert "4 steps of 2" in plan
    assert str(result.output) in plan
    grid = np.asarray(Image.open(result.out[1])).astype(int)
    assert grid.shape[1] > 8 * 16  # four of each
    prompt = ("--prompt", "a zqx cube")
    plain = sampled(command, model, "plain", *prompt)
    changed = sampled(command, model, "changed", *prompt, "--lora", result.output)
    assert changed.code == 0
    assert any("layers, weight 1" in line for line in changed.err)
    assert np.abs(plain.images[0] - changed.images[0]).max() > 0


def test_a_run_that_was_stopped_goes_on(lora: SimpleNamespace, finetune: Finetune) -> None:
    stopped = finetune(*LORA_OF_TWO, "--stop_at", 2)
    assert stopped.code == 0
    assert not stopped.output.exists()
    assert finetune(*LORA_OF_TWO).code == 0
    expected, found = load_file(lora.output), load_file(stopped.output)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-6)


def test_dreambooth_keeps_its_class_images_and_writes_a_checkpoint(
    finetune: Finetune, command: Callable, model: tuple
) -> None:
    words = ("--method", "dreambooth", "--prompt", "a zqx cube", "--class_prompt", "a {red|blue} cube")
    words += ("--class_images", 3, "--learning_rate", 0.01)
    result = finetune(*words)
    assert result.code == 0
    made = sorted(result.output.with_suffix("").glob("class-images/*/*.png"))
    assert [path.name for path in made] == ["0000.png", "0001.png", "0002.png"]
    captions = {path.with_suffix(".txt").read_text() for path in made}
    assert captions == {"a red cube\n", "a blue cube\n"}
    config, ckpt = model
    before, after = load_file(ckpt), load_file(result.output)
    changed = {name for name in after if not np.array_equal(before[name].half(), after[name])}
    assert changed
    assert all(name.startswith("model.diffusion_model.") for name in changed)
    words = ["--config", config, "--ckpt", result.output, "--prompt", "a", "--ddim_steps", 2]
    drawn = command("txt2img", *words, "--n_samples", 1, "--n_iter", 1)
    assert drawn.code == 0


def test_dreambooth_as_a_lora(finetune: Finetune) -> None:
    result = finetune("--method", "dreambooth", "--prompt", "a zqx cube", "--lora", "--rank", 2)
    assert result.code == 0
    assert any(name.startswith("lora_unet_") for name in load_file(result.output))


def test_a_lora_for_few_steps(finetune: Finetune, command: Callable, model: tuple[Path, Path]) -> None:
    words = ("--method", "distillation", "--prompt", "a cube", "--rank", 2, "--sampler", "tcd")
    result = finetune(*words, "--scale", 3)
    assert result.code == 0
    changes = {name: t for name, t in load_file(result.output).items() if name.endswith("lora_up.weight")}
    assert any(values.abs().max() > 0 for values in changes.values())
    assert Path(result.out[1]).name == "before-after.png"
    how = ("--prompt", "a cube", "--lora", result.output, "--sampler", "tcd", "--scale", 1)
    drawn = sampled(command, model, "tcd", *how)
    assert drawn.code == 0
    assert any(line.endswith("its file advises: --sampler tcd --steps 2 --scale 1") for line in drawn.err)
    other = finetune(*words, "--scale", 5)
    assert other.code == 2
    assert "another scale: 3, not 5" in other.err[-1]


def test_full_trains_the_unet_and_the_text_encoder_if_asked(finetune: Finetune, model: tuple) -> None:
    before = load_file(model[1])
    for words in ((), ("--text_encoder",)):
        result = finetune("--method", "full", "--prompt", "a", "--learning_rate", 0.01, *words,
                          output=model[1].parent / f"full{len(words)}" / "m.safetensors")  # fmt: skip
        after = load_file(result.output)
        changed = {n.partition(".")[0] for n in after if not np.array_equal(before[n].half(), after[n])}
        assert changed == {"model", *(["cond_stage_model"] if words else [])}


def test_a_folder_that_is_missing_or_has_no_images(finetune: Finetune, tmp_path: Path) -> None:
    refused(finetune(*LORA, data=tmp_path / "nowhere"), "--data", "nowhere")
    (tmp_path / "empty").mkdir()
    refused(finetune(*LORA, data=tmp_path / "empty"), "empty", "no images")


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "controlnet"])
@pytest.mark.parametrize(
    ("files", "why"),
    [({}, "has no images"), ({"a.txt": b"a zqx cube"}, "has no images"), ({"a.png": b"png"}, "can be read")],
    ids=["empty", "text", "corrupt"],
)
def test_a_folder_without_an_image_to_learn_from(
    finetune: Finetune, tmp_path: Path, method: str, files: dict, why: str
) -> None:
    """With --prompt it was refused late, under a line of Lightning's, and its output folder stayed."""
    (tmp_path / "none").mkdir()
    for name, content in files.items():
        (tmp_path / "none" / name).write_bytes(content)
    own = {"textual_inversion": ("--token", "zqx", "--init_word", "cube")}
    own["controlnet"] = ("--preprocess", "canny")
    words = ("--method", method, "--prompt", "a zqx cube", *own.get(method, ()))
    result = finetune(*words, data=tmp_path / "none")
    refused(result, str(tmp_path / "none"), why)
    assert not result.output.parent.exists()


def test_a_refused_option_leaves_no_folder(finetune: Finetune, tmp_path: Path) -> None:
    """An empty one stayed; one that was there before, or has something in it, still does."""
    result = finetune(*LORA, "--layers", "(")
    refused(result, "--layers")
    assert not result.output.parent.exists()
    result.output.parent.mkdir()
    finetune(*LORA, "--layers", "(")
    assert list(result.output.parent.iterdir()) == []


def test_a_run_of_other_options_is_not_gone_on_with(
    finetune: Finetune, folder: Path, model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on silently, under other options or upon another model."""
    inversion = ("--method", "textual_inversion", "--prompt", "a zqx", "--token", "zqx")
    (folder / "0.txt").unlink()
    assert finetune(*inversion, "--init_word", "cube", "--stop_at", 1).code == 0
    result = finetune(*inversion, "--init_word", "cone", "--stop_at", 2)
    assert any("the run goes on with --init_word cube -> cone" in line for line in result.err)
    monkeypatch.setattr("ldm.weights.loading.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    refused(finetune(*LORA), "has another --method: textual_inversion, not lora", "choose another --output")
    more = ("--init_word", "cone", "--vectors", 2)
    refused(finetune(*inversion, *more), "has another --vectors: 1, not 2", "choose another --output")
    monkeypatch.setattr("ldm.weights.hashes.file_hash", lambda path: "0123456789")
    refused(finetune(*inversion, "--init_word", "cone"), "has another --ckpt", "not 0123456789")


def test_images_without_captions_need_a_prompt(finetune: Finetune, folder: Path) -> None:
    (folder / "0.txt").unlink()
    refused(finetune("--method", "lora"), "--prompt", "caption")
    refused(finetune("--method", "lora", "--prompt", " "), "--prompt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "full", "--prompt", "a", "--rank", "4"), ("lora, distillation or dreambooth", "full")),
        ((*LORA, "--class_prompt", "a cube"), ("--class_prompt", "dreambooth")),
        (("--method", "distillation", "--prompt", "a", "--text_encoder"), ("--text_encoder", "distillation")),
        (("--method", "distillation", "--prompt", "a", "training.min_snr_gamma=5"), ("min_snr_gamma 5",)),
        (("--method", "distillation", "--prompt", "a", "--layers", "nowhere"), ("--layers", "nowhere")),
        ((*LORA, "--token", "<x>"), ("--token", "textual_inversion")),
        (("--method", "dreambooth", "--prompt", "a", "--rank", "4"), ("--rank", "--lora")),
        (("--method", "dreambooth", "--prompt", "a", "--class_images", "4"), ("--class_images", "_prompt")),
        (("--method", "dreambooth", "--prompt", "a", "--class_prompt", "a"), ("--class_prompt", "--prompt")),
        (("--method", "dreambooth", "--prompt", "a", "--class_prompt", "a {b|"), ("--class_prompt", "a {")),
        ((*LORA, "--rank", "0"), ("--rank", "0 is not", "1 …")),
        ((*LORA, "--alpha", "-1"), ("--alpha", "-1")),
        ((*LORA, "--layers", "atn2.to_k"), ("atn2.to_k", "matches none", "to_k")),
        ((*LORA, "--layers", "("), ("--layers", "regular expression")),
        ((*LORA, "--text_encoder", "--layers", "attn2.to_k"), ("--text_encoder", "attn2.to_k", "such as")),
        ((*LORA, "training.zero_terminal_snr=true"), ("zero_terminal_snr", "--method lora", "--method full")),
        ((*LORA, "--layout", "peft"), ("--layout", "kohya", "diffusers")),
        ((*LORA, "model.x=3"), ("model.x=3", "training.")),
        ((*LORA, "training.warmpu=3"), ("warmpu", "warmup")),
        ((*LORA, "data.size=20"), ("size", "multiple of 8")),
        ((*LORA, "data.size=48", "data.buckets=true"), ("bucket_step must be at most size, 48", "64")),
        ((*LORA, "training.init=x.ckpt"), ("training.init", "starts from --ckpt")),
        ((*LORA, "training.first_stage=x.ckpt"), ("training.first_stage", "starts from --ckpt")),
        (("--method", "loha", "--prompt", "a"), ("loha", "controlnet")),
    ],
    ids=lambda words: " ".join(words[-2:]),
)  # fmt: skip
def test_bad_input_is_one_line_before_the_model_is_loaded(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch, words: tuple, said: tuple
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ldm.weights.loading.load_model", loaded)
    refused(finetune(*words), *said)


def test_outputs_that_cannot_be_written(finetune: Finetune, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(finetune(*LORA, output=tmp_path / "file" / "zqx.safetensors"), "--output", "file")
    refused(finetune(*LORA, output=tmp_path / "zqx.ckpt"), "--output", "zqx.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    result = finetune(*LORA, output=tmp_path / "d.safetensors")
    assert result.code == 2
    assert "--output" in result.err[0]


def test_help_lists_the_methods(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.run(script("finetune").main, ["--help"])
    out = capsys.readouterr().out
    for word in ("textual_inversion", "--class_prompt", "--rank", "--preprocess"):
        assert word in out


def sampled(command: Callable, model: tuple, name: str, *words: Any) -> SimpleNamespace:
    """txt2img.py's image of the miniature."""
    config, ckpt = model
    plain = ["--config", config, "--ckpt", ckpt, "--ddim_steps", 2, "--n_samples", 1, "--n_iter", 1]
    return command("txt2img", *plain, "--skip_grid", *words, folder=name)


def test_a_new_word_is_learned_and_read_by_txt2img(
    finetune: Finetune, command: Callable, model: tuple, folder: Path
) -> None:
    (folder / "0.txt").unlink()
    words = ("--token", "<dice>", "--init_word", "cube", "--vectors", 2)
    result = finetune("--method", "textual_inversion", *words)
    own = result.output.with_suffix("")
    assert result.code == 0
    assert result.out == [str(result.output), str(own / "dice.pt"), str(own / "before-after.png")]
    (vectors,) = load_file(result.output).values()
    assert len(vectors) == 2
    assert not np.allclose(vectors[0], vectors[1]), "both have learned"
    with_word = sampled(command, model, "word", "--prompt", "a <dice>", "--embedding", result.output)
    assert with_word.code == 0
    plain = sampled(command, model, "plain", "--prompt", "a <dice>")
    assert np.abs(plain.images[0] - with_word.images[0]).max() > 0


def test_mistakes_about_a_new_word(finetune: Finetune, folder: Path) -> None:
    inversion = ("--method", "textual_inversion", "--token", "<dice>")
    refused(finetune(*inversion), "--init_word is missing")
    refused(finetune(*inversion, "--init_word", "photorealistically"), "is 3 tokens ('photo', ")
    refused(finetune(*inversion, "--init_word", "cube"), "'a zqx cube on the left' does not name <dice>")
    dropped = finetune(*inversion, "--init_word", "cube", "training.prompt_dropout=0.5")
    refused(dropped, "prompt_dropout 0.5")
    (folder / "0.txt").unlink()
    many = finetune(*inversion, "--init_word", "cube", "--vectors", 75)
    refused(many, "'a photo of a <dice>' names <dice> too late", "--vectors 75")
    known = ("--token", "dog", "--init_word", "cube")
    refused(finetune("--method", "textual_inversion", *known), "--token dog")


def test_a_controlnet_is_trained_and_followed_by_txt2img(
    finetune: Finetune, command: Callable, model: tuple, folder: Path
) -> None:
    edges = ("--method", "controlnet", "--preprocess", "canny", "--learning_rate", 0.01)
    result = finetune(*edges)
    own = result.output.with_suffix("")
    assert result.code == 0
    left = (result.output, own / "controlnet-diffusers", own / "before-after.png")
    assert result.out == list(map(str, left))
    state = load_file(result.output)
    assert all(name.startswith("control_model.") for name in state)
    assert state["control_model.zero_convs.0.0.weight"].any()
    control = ("--control", f"{result.output}:{folder / '1.png'}", "--control_preprocess", "canny")
    led = sampled(command, model, "led", "--prompt", "a", *control)
    plain = sampled(command, model, "plain", "--prompt", "a")
    assert led.code == 0
    assert np.abs(plain.images[0] - led.images[0]).max() > 0
    again = result.output.with_name("again.safetensors")
    assert finetune(*edges, "--control_init", result.output, output=again).code == 0


def test_mistakes_about_control_images(finetune: Finetune, folder: Path) -> None:
    refused(finetune("--method", "controlnet"), "images has no control images: put them into", "canny")
    assert "cannot be read" not in finetune("--method", "controlnet").err[0]
    control = folder / "control"
    control.mkdir()
    Image.new("RGB", (24, 20)).save(control / "0.png")
    refused(finetune("--method", "controlnet"), "has no control image", "1.png")
    for k in range(3):
        Image.new("RGB", (24, 24)).save(control / f"{k}.png")
    refused(finetune("--method", "controlnet"), "has 24x24 pixels and the image 24x20")
    init = ("--preprocess", "canny", "--control_init", folder / "0.png")
    refused(finetune("--method", "controlnet", *init), "0.png")


def write_base(path: Path, images: Path) -> Path:
    """A YAML file with images of its own."""
    train = {"target": "ldm.training.data.folder.ImageFolder", "params": {"path": str(images)}}
    path.write_text(json.dumps({"data": {"train": train}}))
    return path


def test_the_folder_of_the_command_line_goes_over_that_of_a_file(finetune: Finetune, tmp_path: Path) -> None:
    """The file's was trained on without a word."""
    base = write_base(tmp_path / "base.yaml", tmp_path / "absent")
    assert finetune(*LORA, "--base", base).code == 0


def test_control_images_of_a_file_s_images(finetune: Finetune, folder: Path, tmp_path: Path) -> None:
    """--preprocess was ignored, or ended in KeyError: 'maps'."""
    base = write_base(tmp_path / "base.yaml", folder)
    for how in ("canny", "depth"):
        words = ["--method", "controlnet", "--preprocess", how, "--base", base]
        result = finetune(*words, data=None)
        refused(result, f"--preprocess {how} makes control images of --data FOLDER")


def test_edges_have_the_size_of_the_images(model: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    """With data.size they were drawn at the model's own size, and resized with the images."""
    config, ckpt = map(str, model)
    words = {"config": config, "ckpt": ckpt, "given": {"steps": 1}, "overrides": ["data.size=32"]}
    output, options = str(tmp_path / "net.safetensors"), Control(preprocess="canny")
    setup = prepare(METHODS["controlnet"], options, str(folder), output, **words)
    assert (setup.data.size, setup.data.train["params"]["size"]) == (32, 32)


def test_captions_that_cannot_be_read_are_left_out(finetune: Finetune, folder: Path) -> None:
    """A file in Latin-1 ended a textual inversion with a traceback."""
    (folder / "0.txt").write_bytes("a zqx c\xfbbe".encode("latin-1"))
    (folder / "1.txt").write_text("a <dice>")
    result = finetune("--method", "textual_inversion", "--token", "<dice>", "--init_word", "cube")
    assert result.code == 0


@pytest.mark.parametrize("section", [tiny_siblings.depth_section, tiny_siblings.upscaler_section])
def test_models_that_are_given_an_image_are_compared_on_one(
    section: Callable[[], dict], folder: Path, tmp_path: Path
) -> None:
    """After all steps the samples of before and after ended in an error: give init_img."""
    model = tiny_siblings.write_model(tmp_path, "sibling", section())
    result = run(model, folder, tmp_path / "zqx.safetensors", *LORA)
    assert result.code == 0, result.err
    assert Image.open(result.out[-1]).width > 8 * 16


def test_a_model_of_zero_terminal_snr_stays_one(
    model: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    """It was trained on the plain schedule, and its file no longer said that samplers rescale it."""
    config = write_config(tmp_path / "v.yaml", {"parameterization": "v"})
    weights = tmp_path / "v.safetensors"
    markers = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file({**read_state_dict(model[1]), **markers}, weights)
    result = run((config, weights), folder, tmp_path / "zqx.safetensors", "--method", "full", "--prompt", "a")
    assert result.code == 0, result.err
    assert markers.keys() <= load_file(result.output).keys()


def test_a_condition_on_the_command_line_is_text(
    model: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    """It was read as YAML, where ">= 5" begins a folded text, and so ended in an error."""
    config, ckpt = map(str, model)
    overrides = ["data.filters.width=>= 5", "data.flip=0.5"]
    words = {"config": config, "ckpt": ckpt, "given": {"steps": 1}, "overrides": overrides}
    output, options = str(tmp_path / "net.safetensors"), Control(preprocess="canny")
    data = prepare(METHODS["controlnet"], options, str(folder), output, **words).data
    assert (data.filters, data.flip) == ({"width": ">= 5"}, 0.5)


def test_zero_terminal_snr_of_a_model_that_has_it(
    model: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    """A LoRA of any other v-model was trained on a schedule that neither it nor its model knew."""
    config = write_config(tmp_path / "v.yaml", {"parameterization": "v"})
    given, state = {"steps": 1, "zero_terminal_snr": True}, read_state_dict(model[1])
    markers = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    for name, marked in (("plain", {}), ("marked", markers)):
        weights = tmp_path / f"{name}.safetensors"
        save_file({**state, **marked}, weights)
        words = {"config": str(config), "ckpt": str(weights), "prompt": "a zqx", "given": given}
        for method in ("lora", "dreambooth"):
            options = METHODS[method].options()
            output = str(tmp_path / f"{name}-{method}" / "zqx.safetensors")
            if name == "marked" or method == "dreambooth":
                assert prepare(
                    METHODS[method], options, str(folder), output, **words
                ).config.zero_terminal_snr
                continue
            with pytest.raises(InputError, match="is not marked as trained with it, and --method lora"):
                prepare(METHODS[method], options, str(folder), output, **words)


def test_an_inpainting_model_needs_masks_before_it_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused after gigabytes had been read."""
    changes = {"conditioning_key": "hybrid", "unet_config.params.in_channels": 9}
    target = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    section = tiny.model_section(changes) | {"target": target}
    config, weights = map(str, tiny_siblings.write_model(tmp_path, "inpainting", section))
    monkeypatch.setattr("ldm.weights.loading.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    output = tmp_path / "out" / "zqx.safetensors"
    result = run((Path(config), Path(weights)), folder, output, *LORA)
    refused(result, "an inpainting model is trained with masks: set `masks: true` in data")
    words = {"config": config, "ckpt": weights, "prompt": "a zqx", "given": {"steps": 1}}
    method = METHODS["lora"]
    prepare(method, method.options(), str(folder), str(output), **words, overrides=["data.masks=true"])


def test_defaults_of_a_distillation(model: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    """For depth and x4 models it learned the scale of text to image; its loss was rounded to bf16's eps."""
    method = METHODS["distillation"]
    depth = tiny_siblings.write_model(tmp_path, "depth", tiny_siblings.depth_section(estimator=False))
    for (config, weights), scale in ((model, 7.5), (depth, 9.0)):
        words = {"config": str(config), "ckpt": str(weights), "prompt": "a", "given": {"steps": 1}}
        output, options = str(tmp_path / f"{scale}.safetensors"), method.options(rank=1)
        setup = prepare(method, options, str(folder), output, **words)
        assert new_task(method, setup, options).scale == scale
        assert setup.config.precision_on("cuda") == "full"
        words["given"]["precision"] = "bf16"
        setup = prepare(method, options, str(folder), output, **words)
        assert setup.config.precision_on("cuda") == "bf16"
