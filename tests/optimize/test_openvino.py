"""`--compile` on a CPU, where OpenVINO is installed. Without it only the line that says so."""

import copy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock
from tiny_sampling import normal, relative_difference, tiny_model
from tiny_siblings import depth_section, upscaler_section
from torch import Tensor

from ldm.cache import cache_folder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import openvino as module
from ldm.optimize.approximate import merge_similar_tokens
from ldm.optimize.layers import KERNELS, use_kernels
from ldm.optimize.openvino import StaticShapes, compile_with_openvino, fingerprint, locked
from ldm.optimize.slicing import slice_attention
from ldm.optimize.tiling import tile_first_stage
from ldm.util import instantiate_from_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def openvino() -> None:
    if find_spec("openvino") is None:
        pytest.skip("needs openvino")


@pytest.fixture(scope="session")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the miniature was converted, which takes seconds."""
    if find_spec("openvino") is None:
        pytest.skip("needs openvino")
    folder = tmp_path_factory.mktemp("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        compile_with_openvino(tiny_model(), report=lambda line: None)
    return folder


@pytest.fixture
def converted(conversion: Path, tmp_path: Path) -> None:
    """The test's own cache has the miniature's networks."""
    shutil.copytree(conversion, tmp_path, dirs_exist_ok=True)


def outputs(model: LatentDiffusion, batch: int = 2, side: int = 8, tokens: int = 5) -> list[Tensor]:
    unet = model.model.diffusion_model
    x, context = normal(batch, unet.in_channels, side, side + 2), normal(batch, tokens, 32, seed=1)
    conds = {"c_concat": [x[:, 4:]], "c_crossattn": [context]}
    if unet.num_classes:
        conds["c_adm"] = torch.arange(batch) + 3
    t = torch.linspace(3.5, 900.0, batch)
    with torch.inference_mode():
        return [model.apply_model(x[:, :4], t, conds), model.decode_first_stage(x[:1, :4])]


def built(section: dict) -> LatentDiffusion:
    from golden_files import pseudo_state_dict

    with torch.inference_mode(False):
        model = instantiate_from_config(section)
        shapes = {name: ["float32", list(t.shape)] for name, t in model.state_dict().items()}
        model.load_state_dict(pseudo_state_dict(shapes), strict=False)
        return model.eval().requires_grad_(False)


SECTIONS = {
    "inpainting": tiny.model_section({"unet_config.params.in_channels": 9, "conditioning_key": "hybrid"}),
    "v2": tiny.model_section(
        {
            "unet_config.params.num_heads": -1,
            "unet_config.params.num_head_channels": 16,
            "unet_config.params.use_linear_in_transformer": True,
            "parameterization": "v",
        }
    ),
    "depth": depth_section(estimator=False),
    "x4": upscaler_section(),
}


@pytest.mark.slow
@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("family", SECTIONS)
def test_every_family_is_within_rounding(family: str) -> None:
    model, reported = built(SECTIONS[family]), []
    plain = outputs(model)
    compile_with_openvino(model, report=reported.append)
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(outputs(model), plain, strict=True))
    # what is converted, and what that took, for the UNet and the decoder; the upscaler's decoder stays plain
    assert len(reported) == (3 if family == "x4" else 4)


@pytest.mark.slow
@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_weights_of_16_bits(model: LatentDiffusion, dtype: torch.dtype, limit: float) -> None:
    exact = outputs(model)
    model.to(dtype)
    compile_with_openvino(model, report=lambda line: None)
    results = outputs(model)
    assert all(result.dtype == dtype for result in results)
    assert all(relative_difference(a, b) < limit for a, b in zip(results, exact, strict=True))
    model.first_stage_to(torch.float32)  # as a decode that yielded NaN is made again
    assert outputs(model)[1].dtype == torch.float32


@pytest.mark.usefixtures("converted")
def test_any_shape_comes_from_one_conversion(model: LatentDiffusion) -> None:
    plain = copy.deepcopy(model)
    compile_with_openvino(model, report=lambda line: None)
    for batch, side, tokens in ((2, 8, 5), (1, 7, 154), (4, 12, 5), (2, 8, 5)):
        results = outputs(model, batch, side, tokens), outputs(plain, batch, side, tokens)
        assert all(relative_difference(a, b) < 1e-4 for a, b in zip(*results, strict=True))
    assert len(list((cache_folder() / "openvino").glob("*/model.xml"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("converted")
def test_the_shapes_used_last_stay_compiled(model: LatentDiffusion, monkeypatch) -> None:
    compiled: list[tuple] = []
    plain = StaticShapes.compile

    def compile(self: StaticShapes, hint: str, *shapes: tuple[int, ...]) -> object:
        compiled.append(shapes[0][:1])
        return plain(self, hint, *shapes)

    monkeypatch.setattr(StaticShapes, "compile", compile)
    compile_with_openvino(model, report=lambda line: None)
    for batch in (1, 2, 1, 3, 1, 2):
        with torch.inference_mode():
            model.apply_model(normal(batch, 4, 8, 8), torch.ones(batch), normal(batch, 5, 32))
    assert compiled == [(1,), (2,), (3,), (2,)]


@pytest.mark.usefixtures("openvino")
def test_a_model_is_converted_once(model: LatentDiffusion, monkeypatch) -> None:
    again, other, reported = copy.deepcopy(model), copy.deepcopy(model), []
    plain = outputs(model)
    compile_with_openvino(model, report=lambda line: None)
    monkeypatch.setattr(module, "convert", None)
    compile_with_openvino(again, report=reported.append)
    assert [line.split(" is read from ")[0] for line in reported] == [
        "--compile: the UNet",
        "--compile: the decoder",
    ]
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(outputs(again), plain, strict=True))
    name, weight = next(iter(other.model.diffusion_model.named_parameters()))
    before = fingerprint(other.model.diffusion_model)
    weight.view(-1)[-1] += 1e-3
    assert fingerprint(other.model.diffusion_model) != before, name


@pytest.mark.usefixtures("converted")
def test_plain_weights_are_let_go_and_other_optimisations_pass_over_them(model: LatentDiffusion) -> None:
    plain = outputs(model)
    compile_with_openvino(model, report=lambda line: None)
    assert all(weight.is_meta for weight in model.model.diffusion_model.parameters())
    use_kernels(model, KERNELS["onednn"])
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(outputs(model), plain, strict=True))


@pytest.mark.usefixtures("openvino")
def test_what_another_option_changed_stays_as_it_is(model: LatentDiffusion) -> None:
    reported: list[str] = []
    tile_first_stage(model)
    plain = outputs(model)
    compile_with_openvino(model, unet_too=False, report=reported.append)
    merge_similar_tokens(model, 0.5)
    compile_with_openvino(model, report=reported.append)
    assert [line.partition(", as")[0] for line in reported] == [
        "--compile: the UNet goes on without OpenVINO",
        "--compile: the decoder goes on without OpenVINO",
    ] * 2
    assert torch.equal(outputs(model)[1], plain[1])


@pytest.mark.usefixtures("openvino")
def test_where_converting_fails_the_plain_model_is_called(model: LatentDiffusion, monkeypatch) -> None:
    def broken(*inputs: object) -> None:
        raise OSError("No space left on device")

    plain, reported = outputs(model), []
    monkeypatch.setattr(module, "convert", broken)
    compile_with_openvino(model, report=reported.append)
    assert all(map(torch.equal, outputs(model), plain))
    assert reported[1] == "--compile: the UNet goes on without OpenVINO: No space left on device"
    assert [path.name for path in (cache_folder() / "openvino").iterdir()] == ["lock"]


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("error", [ImportError("libopenvino.so"), MemoryError()])
def test_a_broken_package_and_too_little_memory_end_nothing(
    model: LatentDiffusion, monkeypatch, error: Exception
) -> None:
    def broken(*inputs: object) -> None:
        raise error

    plain, reported = outputs(model), []
    monkeypatch.setattr(module, "key_of", broken)
    compile_with_openvino(model, report=reported.append)
    assert all(map(torch.equal, outputs(model), plain))
    reason = str(error) or "MemoryError"
    assert reported == [
        f"--compile: the {name} goes on without OpenVINO: {reason}" for name in ("UNet", "decoder")
    ]


@pytest.mark.usefixtures("converted")
def test_a_damaged_file_is_found_before_the_weights_go_and_converted_anew(model: LatentDiffusion) -> None:
    """The first step ended in an error, when the plain weights were gone."""
    first, again, reported = copy.deepcopy(model), copy.deepcopy(model), []
    plain = outputs(model)
    compile_with_openvino(first, report=lambda line: None)
    (folder,) = (cache_folder() / "openvino").glob("UNet-*")
    damaged = (folder / "model.bin").read_bytes()
    (folder / "model.bin").unlink()  # `first` may have it in memory, as a map of the file
    (folder / "model.bin").write_bytes(damaged[: len(damaged) // 2])
    compile_with_openvino(model, report=reported.append)
    assert [line.startswith("--compile: the UNet goes on without OpenVINO: ") for line in reported] == [
        False,  # where it is read from
        True,
        False,  # where the decoder is read from
    ]
    assert torch.equal(outputs(model)[0], plain[0])
    assert not folder.exists()
    compile_with_openvino(again, report=reported.append)
    assert reported[3].startswith("--compile: converting the UNet")
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(outputs(again), plain, strict=True))


@pytest.mark.usefixtures("converted")
def test_files_may_be_removed_once_they_are_read(model: LatentDiffusion) -> None:
    plain = outputs(model)
    compile_with_openvino(model, report=lambda line: None)
    shutil.rmtree(cache_folder() / "openvino")
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(outputs(model), plain, strict=True))


@pytest.mark.usefixtures("openvino")
def test_slicing_is_named_as_what_changed_both(model: LatentDiffusion) -> None:
    reported: list[str] = []
    slice_attention(model)
    compile_with_openvino(model, report=reported.append)
    assert len(reported) == 2
    assert all("--attention_slicing" in line for line in reported)


@pytest.mark.usefixtures("openvino")
def test_an_upscalers_decoder_stays_as_it_is() -> None:
    """Its tiles were each normalised by their own statistics, and drifted apart in colour."""
    model, reported = built(SECTIONS["x4"]), []
    compile_with_openvino(model, unet_too=False, report=reported.append)
    assert reported[1].endswith("the upscaler's tiles need its norms")
    assert not any(weight.is_meta for weight in model.first_stage_model.parameters())


def test_who_waits_for_another_process_says_so(tmp_path: Path) -> None:
    reported: list[str] = []
    other = FileLock(tmp_path / "lock")
    other.acquire()

    def report(line: str) -> None:
        reported.append(line)
        other.release()

    for _ in range(2):
        with locked(tmp_path / "lock", "UNet", report):
            pass
    assert reported == ["--compile: another process converts the UNet; waiting for it"]


@pytest.mark.slow
@pytest.mark.usefixtures("openvino")
def test_the_cache_keeps_a_few_networks(model: LatentDiffusion, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    for _ in range(2):
        with torch.no_grad():
            model.model.diffusion_model.out[2].bias += 1
        compile_with_openvino(copy.deepcopy(model), report=lambda line: None)
    names = sorted(path.parent.name[:4] for path in (cache_folder() / "openvino").glob("*/model.xml"))
    assert names == ["UNet", "deco"]


def test_without_the_package_a_line_says_what_to_install(model: LatentDiffusion, monkeypatch) -> None:
    plain, reported = outputs(model), []
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    compile_with_openvino(model, report=reported.append)
    assert len(reported) == 1
    assert "pip install openvino" in reported[0]
    assert all(map(torch.equal, outputs(model), plain))


@pytest.mark.usefixtures("converted")
def test_signals_are_handled_after_a_network_is_let_go_of_in_another_thread() -> None:
    """As a service does that drops a model: the next signal killed the process without a word, as OpenVINO
    had unmapped the stack that it had given to the first thread for signal handlers.
    """
    (path,) = (cache_folder() / "openvino").glob("decoder-*/model.xml")
    code = (
        "import gc, signal, sys, threading; from pathlib import Path; import torch;"
        "from ldm.optimize.openvino import StaticShapes;"
        "networks = [StaticShapes('decoder', Path(sys.argv[1]))]; networks[0](torch.zeros(1, 4, 8, 8));"
        "thread = threading.Thread(target=networks.clear); thread.start(); thread.join(); gc.collect();"
        "signal.signal(signal.SIGINT, lambda *_: print('handled')); signal.raise_signal(signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


@pytest.mark.usefixtures("openvino")
def test_nothing_is_reported_to_anybody() -> None:
    """Converting a model sent an event to Google Analytics, as OpenVINO does unless it is kept from it."""
    code = (
        "from ldm.optimize.openvino import import_openvino; import_openvino();"
        "from openvino.tools.ovc import telemetry_utils; print(telemetry_utils.tm.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "openvino.tools.ovc.telemetry_stub"
