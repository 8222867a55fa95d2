"""scripts/convert.py on real files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import SCRIPTS, Result, script
from safetensors.torch import load_file, save_file

from ldm.cli import entry
from ldm.weights.checkpoint import read_state_dict


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs the command; gives exit code, stdout, and stderr's lines."""

    def run(*argv: object) -> tuple[int, str, list[str]]:
        words = [str(SCRIPTS / "convert.py"), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", words)
        code = entry.run(script("convert").main)
        out, err = capsys.readouterr()
        return code, out.strip(), err.splitlines()

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_weights(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def test_formats_and_precisions(convert: Callable, source: Path, tmp_path: Path) -> None:
    state = load_file(source)
    assert convert(source, tmp_path / "a.ckpt") == (0, str(tmp_path / "a.ckpt"), [])
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert file.keys() == {"state_dict"}
    assert all(torch.equal(file["state_dict"][name], t) for name, t in state.items())
    assert convert(tmp_path / "a.ckpt", tmp_path / "b", "--to", "safetensors", "--precision", "bf16")[0] == 0
    found = load_file(tmp_path / "b")
    assert found["model.diffusion_model.out.2.weight"].dtype == torch.bfloat16
    assert found["betas"].dtype == torch.float32


def test_a_folder_and_back(convert: Callable, source: Path, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    code, _, err = convert(source, tmp_path / "folder", "--config", config)
    assert code == 0
    assert "A diffusers folder cannot hold 12 of the tensors: buffers of the schedule (12)" in err
    assert json.loads((tmp_path / "folder/model_index.json").read_text())["_class_name"] == (
        "StableDiffusionPipeline"
    )
    assert convert(tmp_path / "folder", tmp_path / "back.safetensors")[0] == 0
    state, back = load_file(source), load_file(tmp_path / "back.safetensors")
    assert len(state) - len(back) == 12
    assert all(torch.equal(state[name], t) for name, t in back.items())


def test_a_folder_makes_the_same_images(
    convert: Callable, command: Callable[..., Result], source: Path, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path / "tiny.yaml")
    folder = tmp_path / "folder"
    assert convert(source, folder, "--config", config)[0] == 0
    argv = ("txt2img", "--config", config, "--ckpt")
    few = ("--steps", 2, "--n_samples", 1, "--n_iter", 1, "--kernels", "torch")
    ours, theirs = (command(*argv, path, *few, folder=f"images-{path.stem}") for path in (source, folder))
    assert (ours.code, theirs.code) == (0, 0)
    assert np.array_equal(ours.images[0], theirs.images[0])


def test_merge_and_vae(convert: Callable, source: Path, tmp_path: Path) -> None:
    state = load_file(source)
    other = {name: t + 1 for name, t in state.items()}
    save_file(other, tmp_path / "other.safetensors")
    argv = (source, tmp_path / "out.ckpt", "--merge", tmp_path / "other.safetensors")
    assert convert(*argv, "--ratio", "0.25")[0] == 0
    name, stage = "model.diffusion_model.out.2.weight", "first_stage_model.quant_conv.weight"
    merged = read_state_dict(tmp_path / "out.ckpt")
    torch.testing.assert_close(merged[name], state[name] + 0.25)
    assert convert(*argv, "--add_difference", source, "--vae", source, "--force")[0] == 0
    merged = read_state_dict(tmp_path / "out.ckpt")
    torch.testing.assert_close(merged[name], state[name] + 0.5)  # the ratio's default
    assert torch.equal(merged[stage], state[stage])


def test_errors_are_one_line(convert: Callable, source: Path, tmp_path: Path) -> None:
    def refused(*argv: object) -> str:
        code, out, err = convert(*argv)
        assert (code, out, len(err)) == (2, "", 1)
        return err[0].removeprefix("convert.py: error: ")

    target = tmp_path / "out.safetensors"
    assert refused(source) == "the following arguments are required: DST"
    assert refused(tmp_path / "no.ckpt", target).startswith(f"no checkpoint at {tmp_path / 'no.ckpt'}")
    assert "is there already" in refused(source, source)
    assert "the suffix .txt is no format" in refused(source, tmp_path / "a.txt")
    assert "are for --merge OTHER" in refused(source, target, "--ratio", "0.5")
    assert "--ratio" in refused(source, target, "--merge", source, "--ratio", "nan")
    assert "--precision" in refused(source, target, "--precision", "fp8")
    assert "has no EMA weights" in refused(source, target, "--weights", "ema")
    save_file({"emb_params": torch.zeros(1, 768)}, none := tmp_path / "embedding.safetensors")
    assert "holds no autoencoder" in refused(source, target, "--vae", none)
    assert "give its config with --config" in refused(source, tmp_path / "folder")
    assert not target.exists()


def test_help_and_arguments_do_without_torch() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import convert
try:
    convert.main(["--help"])
except SystemExit:
    pass
try:
    convert.main(["a.ckpt", "b.txt"])
except ValueError as error:
    print(error)
print({{"torch", "transformers"}} & {{*sys.modules}})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-2:] == [
        "b.txt: the suffix .txt is no format; choose one with --to",
        "set()",
    ]
