"""scripts/model_info.py on real files."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import Tiny, save
from commands import SCRIPTS, script
from PIL import Image
from safetensors.torch import save_file

from ldm.cli import entry
from ldm.weights.loading import BUNDLED_WEIGHTS, ROOT

BUNDLED = ROOT / BUNDLED_WEIGHTS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hash is known at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def info(monkeypatch, capsys):
    """Runs the command; gives exit code, lines of stdout and lines of stderr."""

    def run(*argv: object) -> tuple[int, list[str], list[str]]:
        words = [str(SCRIPTS / "model_info.py"), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", words)
        code = entry.run(script("model_info").main)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def facts(info):
    def run(*argv: object) -> dict:
        code, out, err = info("--json", *argv)
        assert (code, len(out)) == (0, 1), err
        return json.loads(out[0])

    return run


def averages(state):
    unet = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    return {"model_ema." + name.replace(".", ""): t for name, t in unet.items()}


def test_text(info):
    code, out, err = info(BUNDLED)
    assert (code, err) == (0, [])
    command = f"python scripts/{{}} --ckpt {BUNDLED}"
    cat = '.py --prompt "a cat"'
    assert out == [
        f"{BUNDLED}: the bundled model",
        "  config configs/scenes/scenes-128.yaml",
        "  size: 23.91 MB, .safetensors",
        "  precision: fp16",
        "  parameters: 11.9 million",
        "    UNet: 6.6 million",
        "    text encoder: 3.4 million",
        "    autoencoder: 2.0 million",
        "    other: 1",
        "  UNet weights: no EMA",
        "  predicts: eps, by its family",
        "  model hash: not computed (--hash)",
        "  model hash of 2022: dec7ca3a",
        f"  makes images of a text: {command.format(f'txt2img{cat}')}",
        f"  makes images of a text and an image: {command.format(f'img2img{cat} --init-img IMAGE')}",
        f"  makes parts of images anew: {command.format(f'inpaint{cat} --init-img IMAGE --mask MASK')}",
    ]


def test_the_hash_is_computed_once(info, facts):
    expected = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()[:10]
    assert facts(BUNDLED)["model_hash"] is None
    code, out, err = info("--hash", BUNDLED)
    assert code == 0
    assert f"  model hash: {expected}" in out
    assert any("hash: " in line and "%" in line for line in err)  # the progress bar
    assert facts(BUNDLED)["model_hash"] == expected
    assert info("--hash", BUNDLED)[1] == out


@pytest.mark.parametrize("form", ["safetensors", "zip", "zip wrapped", "legacy wrapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_format_and_precision(facts, tmp_path, form, dtype):
    state = {name: t.to(dtype) for name, t in Tiny(5, 1024).state_dict().items()}
    state["depth_model.model.x"] = torch.zeros(3, 5, dtype=dtype)
    path = save(state, tmp_path / "w 1", form)
    found = facts(path)
    assert found["family"] == "Stable Diffusion v2 depth"
    assert found["format"] == (".safetensors" if form == "safetensors" else ".ckpt")
    assert found["size"] == path.stat().st_size
    total = sum(t.numel() for t in state.values())
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert (found["parameters"], found["precision"]) == (total, {name: total})
    assert found["parts"]["depth estimator"] == 15
    assert sum(found["parts"].values()) == total
    assert found["global_step"] == (470000 if "wrapped" in form else None)
    assert (found["prediction"], found["prediction_known_by"]) == ("eps", "its family")
    (use,) = found["uses"]
    assert use["command"].endswith(f"depth2img.py --prompt \"a cat\" --init-img IMAGE --ckpt '{path}'")


@pytest.mark.parametrize(
    ("raw", "averaged", "weights"),
    [(True, False, "raw"), (True, True, "raw and ema"), (False, True, "ema")],
)
def test_averaged_weights(info, facts, tmp_path, raw, averaged, weights):
    plain = Tiny().state_dict()
    rest = {name: t for name, t in plain.items() if not name.startswith("model.")}
    numbers = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    state = (plain if raw else rest) | (averages(plain) if averaged else {}) | numbers
    path = save(state, tmp_path / "w", "zip")
    found = facts(path)
    assert (found["family"], found["weights"]) == ("Stable Diffusion v1", weights)
    unet = sum(t.numel() for name, t in plain.items() if name.startswith("model."))
    assert found["parts"].get("UNet") == (unet if raw else None)
    assert found["parts"].get("UNet, averaged") == (unet if averaged else None)
    assert ("--weights ema" in found["uses"][0]["command"]) == (weights == "ema")


@pytest.mark.parametrize(
    ("name", "metadata", "prediction", "known_by", "config"),
    [
        ("768-v-ema", {}, "v", "the name 768-v-ema", "v2-inference-v.yaml"),
        ("w", {"modelspec.prediction_type": "v"}, "v", "its metadata", "v2-inference-v.yaml"),
        ("512-base-ema", {}, "eps", "the name 512-base-ema", "v2-inference.yaml"),
        ("w", {}, None, "a test when it is loaded", "v2-inference-v.yaml"),
    ],
)
def test_eps_or_v(facts, tmp_path, name, metadata, prediction, known_by, config):
    save_file(Tiny(context=1024).state_dict(), tmp_path / name, metadata=metadata)
    found = facts(tmp_path / name)
    assert found["prediction"] == prediction
    assert found["prediction_known_by"].startswith(known_by)
    assert found["config"].endswith(config)
    assert (" or " in found["config"]) == (prediction is None)


OTHERS = {
    "a LoRA": {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 8)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(4, 8)},
    "Stable Diffusion XL": {"conditioner.embedders.0.transformer.x": torch.zeros(4, 8)},
    "FLUX": {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 8)},
    "a textual inversion": {"emb_params": torch.zeros(4, 8)},
    "an autoencoder alone": {"encoder.conv_in.weight": torch.zeros(4, 8)},
    "a pixel upscaler": {"body.0.rdb1.conv1.weight": torch.zeros(4, 8)},
    "an unknown model": {"layer.weight": torch.zeros(4, 8)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_no_whole_model(info, facts, tmp_path, name):
    path = save(OTHERS[name], tmp_path / "w", "safetensors")
    found = facts(path)
    assert (found["family"], found["supported"], found["config"]) == (name, False, None)
    assert (found["parameters"], found["prediction"], found["weights"]) == (32, None, None)
    ends = {
        "an autoencoder alone": f'txt2img.py --prompt "a cat" --vae {path}',
        "a pixel upscaler": f"upscale.py --init-img IMAGE --model {path}",
        "a LoRA": f'txt2img.py --prompt "a cat" --lora {path}',
        "a ControlNet": f'txt2img.py --prompt "a cat" --control {path}:IMAGE',
        "a textual inversion": f"txt2img.py --prompt 'a photo of w' --embedding {path}",
    }
    commands = [f"python scripts/{ends[name]}"] if name in ends else []
    assert [use["command"] for use in found["uses"]] == commands
    assert ("  cannot be run here" in info(path)[1]) == (name not in ends)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)},
        {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)},
        {"control_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 2048)},
        {"some.lora.thing": torch.zeros(4, 8)},
    ],
    ids=["LoRA", "textual inversion", "ControlNet", "unknown LoRA"],
)
def test_parts_of_models_that_cannot_be_run_have_no_command(info, tmp_path, tensors):
    """The command would be refused for its model, Stable Diffusion XL, or for its names."""
    code, out, _ = info(save(tensors, tmp_path / "w", "safetensors"))
    assert code == 0
    assert "  cannot be run here" in out
    assert not any("scripts/" in line for line in out)


def test_a_published_controlnet_is_a_checkpoint_besides(facts, tmp_path):
    """Only the commands of the checkpoint around it were named."""
    control = {"control_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}
    path = save(Tiny().state_dict() | control, tmp_path / "control_sd15_canny.pth", "zip")
    commands = [use["command"] for use in facts(path)["uses"]]
    assert len(commands) == 4
    assert commands[-1].endswith(f"--control {path}:IMAGE")


def test_the_commands_of_bundled_parts_make_images(info, tmp_path, command):
    """What is printed can be run as it is, but for the words that stand for the user's files."""
    Image.new("RGB", (64, 64), "red").save(image := tmp_path / "edges.png")
    parts = ROOT / "models/loras/few-steps.safetensors", ROOT / "models/scenes-128-canny/model.safetensors"
    for number, part in enumerate(parts):
        (line,) = [line for line in info(part)[1] if "scripts/" in line]
        words = shlex.split(line.partition("scripts/txt2img.py ")[2].replace("IMAGE", str(image)))
        result = command("txt2img", *words, "--ckpt", BUNDLED, "--dry_run", folder=f"out-{number}")
        assert result.code == 0, result.err


def test_an_embedding_and_an_upscaler_in_a_pickle(facts, tmp_path):
    """Their tensors are not at the top of the file, where checkpoints have them."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}
    torch.save(content, tmp_path / "cat.pt")
    found = facts(tmp_path / "cat.pt")
    assert (found["family"], found["parts"]) == ("a textual inversion", {"textual inversion": 2 * 768})
    for number, content in enumerate(({"<cat-toy>": torch.zeros(1, 768)}, torch.zeros(1, 768))):
        torch.save(content, tmp_path / f"{number}.bin")  # diffusers', and a tensor without any name
        (use,) = facts(tmp_path / f"{number}.bin")["uses"]
        assert use["command"].endswith(f"--embedding {tmp_path / f'{number}.bin'}")
    torch.save({"params_ema": {"body.0.rdb1.conv1.weight": torch.zeros(3)}}, tmp_path / "RealESRGAN.pth")
    assert facts(tmp_path / "RealESRGAN.pth")["family"] == "a pixel upscaler"


def test_a_diffusers_folder(facts, tmp_path):
    tiny_pipeline = pytest.importorskip("diffusers_pipelines").tiny_pipeline
    tiny_pipeline("v2-v").save_pretrained(tmp_path / "folder")
    found = facts(tmp_path / "folder")
    assert found["format"] == "diffusers folder"
    assert {"UNet", "autoencoder", "text encoder"} <= found["parts"].keys()
    assert found["size"] > found["parameters"] * 4
    assert Path(found["hashed_file"]).parent == tmp_path / "folder/unet"


def test_unreadable_files_are_a_line_each_and_the_others_go_on(info, tmp_path):
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html>")
    (tmp_path / "cut.safetensors").write_bytes(BUNDLED.read_bytes()[:5000])
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    bad = [tmp_path / name for name in ("page.ckpt", "cut.safetensors", "empty.ckpt", "none.ckpt")] + [
        tmp_path
    ]
    code, out, err = info("--json", *bad, BUNDLED)
    assert (code, len(out)) == (1, 1)
    words = ["is a web page", "is cut short", "holds no tensors", "no checkpoint at", "is a folder"]
    for path, line, word in zip(bad, err, words, strict=True):
        assert line.startswith("model_info.py: error: ")
        assert str(path) in line
        assert word in line
    assert info(*bad)[:2] == (2, [])


def test_code_in_a_pickle_is_refused(info, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'run')!r}, 'w')",)

    torch.save({"state_dict": {"a": torch.zeros(3)}, "x": Evil()}, tmp_path / "w.ckpt")
    code, _, err = info(tmp_path / "w.ckpt")
    assert (code, len(err)) == (2, 1)
    assert "carries code" in err[0]
    assert not (tmp_path / "run").exists()


def test_names_are_shown_without_control_characters(info, tmp_path):
    path = save(Tiny().state_dict(), tmp_path / "\x1b[31m.ckpt", "zip")
    assert not any("\x1b" in line for line in info(path)[1])


def test_the_process_imports_no_torch_and_reads_no_weights(tmp_path):
    """A file whose weights would take terabytes answers like any other."""
    for place, form in ((tmp_path / "a.ckpt", "zip wrapped"), (tmp_path / "b.safetensors", "safetensors")):
        save(Tiny(9, 768).state_dict(), place, form)
    size = 2**38
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": [2**32, 4, 2, 4]}
    header = {name: {"dtype": "F16", "shape": s, "data_offsets": [0, size]} for name, s in shapes.items()}
    text = json.dumps(header).encode()
    with (tmp_path / "c.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)  # a file with a hole
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    files = sorted(tmp_path.glob("*.*"))
    argv = [sys.executable, "-c", code, SCRIPTS / "model_info.py", "--json", *files]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["family"] for each in found[:2]] == ["Stable Diffusion v1 inpainting"] * 2
    assert found[2]["parameters"] == 2**37


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        script("model_info").main(["--debug", str(tmp_path / "none")])
