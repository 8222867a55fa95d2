"""`scripts/doctor.py`: what it finds here, and in installations that are broken on purpose."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import SCRIPTS, Result, refused
from safetensors.torch import save_file

from ldm.cli import doctor
from ldm.cli.doctor import Finding
from ldm.weights import loading

ROOT = loading.ROOT
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
V1 = loading.V1_WEIGHTS[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of this repository's models, to be broken."""
    folder = tmp_path / "repository"
    for task in loading.COMMANDS:
        bundled = folder / loading.bundled_for(task).bundled
        bundled.parent.mkdir(parents=True)
        bundled.symlink_to(ROOT / loading.bundled_for(task).bundled)
        link_of(task, folder).parent.mkdir(parents=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "ROOT", folder)
    return folder


def link_of(task: str, folder: Path) -> Path:
    """Where the weights for a task are linked in a copy of this repository."""
    return folder / loading.LINKED / loading.published_for(task).folder / "model.ckpt"


def replace(path: Path, content: bytes | str) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def one(findings: doctor.Findings) -> Finding:
    (finding,) = findings
    return finding


def test_all_is_well(command: Callable[..., Result], place: Path) -> None:
    result = command("doctor")
    assert (result.code, result.err, result.folder.exists()) == (0, [], False)
    assert {line[:4] for line in result.out} == {"ok  ", "--  "}
    for name in ("scenes-128-inpainting", "scenes-128-depth", "scenes-x4"):
        assert sum(f"bundled model models/{name}/" in line for line in result.out) == 1, name
    absent = (
        ("Stable Diffusion", "txt2img.py or img2img.py", "model"),
        ("Stable Diffusion v1 inpainting", "inpaint.py", "inpainting model"),
        ("Stable Diffusion v2 depth", "depth2img.py", "depth model"),
        ("Stable Diffusion x4 upscaler", "upscale.py", "x4 upscaler"),
    )
    for weights, commands, bundled in absent:
        line = f"--  no {weights} weights are linked, images of {commands} come from the bundled {bundled}: "
        assert sum(line in each for each in result.out) == 1, line
    for start in (
        "ok  Python 3.",
        f"ok  numpy {metadata.version('numpy')}",
        f"ok  torch {torch.__version__} (built for ",
        "ok  CPU cores: ",
        "ok  cpu: float32 works",
        "ok  bundled model models/scenes-128/model.safetensors: 12 million weights, all there, model hash ",
        "--  no folder models/safety-checker: images are unchecked",
    ):
        assert sum(line.startswith(start) for line in result.out) == 1, start


def test_a_process_prints_one_json_list(tmp_path: Path) -> None:
    argv = [sys.executable, SCRIPTS / "doctor.py", "--json", "--outdir", tmp_path / "no/folder"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    findings = json.loads(result.stdout)
    assert {tuple(finding) for finding in findings} == {("state", "what", "advice")}
    assert result.returncode == any(finding["state"] == "broken" for finding in findings)
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch() -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['doctor.py', '--help']; {run_script()}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--json" in result.stdout


def run_script() -> str:
    return f"import runpy; runpy.run_path({str(SCRIPTS / 'doctor.py')!r}, run_name='__main__')"


def test_wrong_arguments(command: Callable[..., Result]) -> None:
    refused(command("doctor", "--jsn"), "--jsn")


def test_broken_things_give_code_1(
    command: Callable[..., Result], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are still examined, and a probe that fails is a finding."""
    replace(place / loading.BUNDLED_WEIGHTS, LFS_POINTER)
    monkeypatch.setattr(doctor, "memory", lambda: 1 / 0)
    result = command("doctor", "--json")
    assert (result.code, result.err) == (1, [])
    found = [finding for finding in json.loads("".join(result.out)) if finding["state"] == "broken"]
    titles = [finding["what"].partition(":")[0] for finding in found]
    assert titles == ["memory", "bundled model for txt2img.py or img2img.py"]
    assert "ZeroDivisionError" in found[0]["what"]
    with pytest.raises(ZeroDivisionError):
        list(doctor.examine("out", debug=True))


def requiring(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    """The installed package requires these."""
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: list(requirements))


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras and what another system needs are left out; versions compare as versions, not as text."""

    def version(name: str) -> str:
        if name == "einops":
            raise metadata.PackageNotFoundError(name)
        return "1.10.dev3+local"

    requiring(
        monkeypatch,
        "einops",
        "numpy>=2.1",
        "tqdm>=1.9",
        "pillow<1.9",
        "torch>=99",
        'diffusers; extra == "test"',
        "nothing; sys_platform == 'nowhere'",
    )
    monkeypatch.setattr(doctor.metadata, "version", version)
    pip = doctor.PIP
    assert list(map(str, doctor.packages())) == [
        f"!!  einops is not installed: {pip} einops",
        f"!!  numpy 1.10.dev3+local does not fit numpy>=2.1: {pip} numpy",
        "ok  tqdm 1.10.dev3+local",
        f"!!  pillow 1.10.dev3+local does not fit pillow<1.9: {pip} pillow",
    ]


def test_a_module_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    requiring(monkeypatch, "invisible-watermark")
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    finding = one(doctor.packages())
    assert "its module imwatermark is not there" in finding.what
    assert finding.advice == f"{doctor.PIP} --force-reinstall invisible-watermark"


def test_requirements_are_those_of_the_installed_package() -> None:
    """They have its version limits, and the extras' packages are not among them."""
    named = [str(requirement) for requirement in doctor.requirements()]
    assert any(text.startswith("torch>=") for text in named)
    assert not any("extra" in text or text in ("pytest", "ruff", "diffusers") for text in named)


def test_the_package_itself_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finding says so and how to install it; Python and torch are not judged by what is not known."""
    monkeypatch.setattr(doctor, "PACKAGE", "stable-diffusion-toolkit-of-nobody")
    finding = one(doctor.packages())
    assert finding.state == "broken"
    assert "is not installed" in finding.what
    assert "--editable ." in finding.advice
    assert one(doctor.python()).state == "ok"
    assert one(doctor.torch_build()).state == "ok"


def test_a_package_that_a_probe_needs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    found = [str(finding) for finding in doctor.examine("out")]
    assert found[0] == f"!!  Python: the module packaging is not there: {doctor.PIP} packaging"
    assert any(line.startswith("ok  cpu: float32") for line in found)


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.9")
    assert one(doctor.python()).advice == "install Python >=3.11 and run `make demo`"


def test_torch_missing(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """One finding, and none about what needs torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    result = command("doctor")
    assert result.code == 1
    assert [line for line in result.out if line.startswith("!!")] == result.out[-1:]
    assert result.out[-1].startswith("!!  torch cannot be imported (")


def test_torch_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert one(doctor.torch_build()).what == "torch 2.9.1+cpu does not fit torch>=2.11"


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "host_memory", lambda: (8 * doctor.GIB, doctor.GIB))
    assert str(one(doctor.memory())).startswith("--  only 1.0 of 8.0 GiB RAM are available: ")


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/inside"):
        finding = one(doctor.output_folder(str(tmp_path / name)))
        assert finding.state == "broken"
        assert "Not a directory" in finding.what
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert one(doctor.output_folder(str(tmp_path / "link"))).state == "broken"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=doctor.GIB / 2))
    finding = one(doctor.output_folder(str(tmp_path / "new/folder")))
    assert (finding.state, finding.what[-13:]) == ("note", " 0.5 GiB free")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


@pytest.mark.parametrize(
    ("gpu", "built", "said", "visible", "state", "words"),
    [
        (False, "13.2", "", None, "note", "images are computed on the CPU"),
        (True, "13.2", "driver too old", None, "broken", "torch cannot use it (driver too old)"),
        (True, None, "", None, "broken", "torch is built without CUDA"),
        (True, "13.2", "", "", "note", "CUDA_VISIBLE_DEVICES hides it"),
    ],
)
def test_no_cuda(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    built: str | None,
    said: str,
    visible: str | None,
    state: str,
    words: str,
) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter(["nvidia0"] if gpu else []))
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = doctor._no_cuda([said] if said else [])
    assert finding.state == state
    assert words in str(finding)


def test_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA GeForce GTX 1660", major=7, minor=5)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (5 * doctor.GIB, 6 * doctor.GIB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a"])
    _, found, warning = doctor.devices()
    name = "cuda:0: NVIDIA GeForce GTX 1660, 5.0 of 6.0 GiB free, compute capability 7.5"
    assert str(found) == f"ok  {name}"
    assert warning.advice == "use --precision full"
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    _, found, _ = doctor.devices()
    assert found.state == "broken"
    assert found.what == f"{name}, for which this torch has no code (only sm_80, sm_90)"


def test_code_for_a_gpu() -> None:
    assert doctor.runs_on(["sm_80", "sm_90"], (8, 9))
    assert doctor.runs_on(["sm_80", "compute_90"], (12, 0))
    assert doctor.runs_on(["sm_120"], (12, 0))
    assert not doctor.runs_on(["sm_90"], (8, 9))
    assert not doctor.runs_on(["sm_80", "sm_90"], (12, 0))
    assert not doctor.runs_on(["sm_80", "compute_90"], (7, 5))


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, wrong values and errors: of consequence only where images are made of them."""

    def compute(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        values, seconds = torch.ones(9), {torch.float32: 3.0, torch.bfloat16: 6.0}.get(dtype, 1.0)
        if dtype == torch.float16:
            return values * (float("nan") if device == "cuda:0" else 1.5), seconds
        if dtype == torch.bfloat16 and device == "cuda:0":
            raise RuntimeError("no kernel\nimage")
        return values, seconds

    monkeypatch.setattr(doctor, "compute", compute)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(map(str, doctor.precisions())) == [
        "ok  cpu: float32 works",
        "--  cpu: float16 does not work (its values are off by 50 %): images do not need it",
        "ok  cpu: bfloat16 works, 2.0 times as slow as float32",
        "ok  cuda:0: float32 works",
        "!!  cuda:0: float16 does not work (its values are NaN): use --precision full",
        "--  cuda:0: bfloat16 does not work (RuntimeError: no kernel image): images do not need it",
    ]


def test_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.modules.encoders import tokenizer

    assert one(doctor.vocabulary()).state == "ok"
    monkeypatch.setattr(tokenizer, "vocabulary_file", lambda: tmp_path / "vocabulary")
    assert one(doctor.vocabulary()).state == "broken"


def models(start: str = "") -> list[Finding]:
    """What examine() finds about the bundled models and the linked weights, from that of `start` on."""
    found = doctor.examine("out")
    starts = ("bundled", "linked", "models/ldm", "no ")
    lines = [finding for finding in found if finding.what.startswith(starts)]
    return [finding for finding in lines if finding.what.startswith(start)]


def broken() -> Finding:
    """The only one of them that is broken."""
    return one(finding for finding in models() if finding.state == "broken")


@pytest.fixture
def only_models(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("packages", "precisions", "devices"):
        monkeypatch.setattr(doctor, name, lambda: iter([]))
    return place


def test_bundled_model(only_models: Path) -> None:
    weights = only_models / loading.BUNDLED_WEIGHTS
    whole = weights.read_bytes()
    for content, words in (
        (LFS_POINTER, "a git-LFS pointer instead of the weights: run `git lfs pull`"),
        (whole[:1000], "is cut short"),
        (whole[:-1], "is cut short"),
        ("", "is empty"),
        ("nonsense", "is not a checkpoint"),
    ):
        replace(weights, content)
        assert words in broken().what
    weights.unlink()
    assert "no checkpoint at" in broken().what


def test_linked_weights(only_models: Path, model: tuple[Path, Path]) -> None:
    link = only_models / V1
    link.symlink_to("/nowhere/sd-v1-4.ckpt")
    assert str(broken()) == (
        f"!!  {V1} is a link to nowhere (/nowhere/sd-v1-4.ckpt): "
        f"link it again with ln -sf /path/to/sd-v1-4.ckpt {V1}"
    )
    link.unlink()
    link.symlink_to(model[1])  # the miniature is not what v1-inference.yaml asks for
    assert "have another shape" in broken().what


def test_linked_weights_that_fit(
    only_models: Path, model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = only_models / V1
    link.symlink_to(model[1])
    monkeypatch.setattr(loading, "V1_CONFIG", str(model[0]))
    found = one(models("linked"))
    assert found.state == "ok"
    assert found.what.startswith(f"linked weights {V1}: ")
    assert "million weights, all there, model hash " in found.what
    assert one(models("no Stable Diffusion v1 inpainting")).what.endswith(
        f"images of inpaint.py come from {V1}"
    )


@pytest.mark.parametrize("task", ["inpaint", "depth", "upscale"])
def test_links_of_the_other_commands(only_models: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that of text to image was looked at: a dangling link, or another model, stopped the command."""
    family, link = loading.published_for(task), link_of(task, Path())
    assert one(models(f"no {family.name.removeprefix('the ')} weights")).state == "note"

    link.symlink_to("/nowhere/model.ckpt")
    again = f"link it again with ln -sf /path/to/{family.download} {link}"
    assert str(broken()) == f"!!  {link} is a link to nowhere (/nowhere/model.ckpt): {again}"

    link.unlink()
    link.symlink_to(ROOT / loading.BUNDLED_WEIGHTS)
    words = f"linked weights for {loading.COMMANDS[task]}: {link} looks like the bundled model "
    assert broken().what.startswith(words)

    monkeypatch.setattr(doctor, "model_loads", lambda *words: [doctor.ok(" ".join(map(str, words)))])
    assert one(models("linked")).what == f"linked weights {family.config} {link}"


def test_a_folder_that_is_a_link_to_nowhere(only_models: Path) -> None:
    """It was taken for one that is not there, with advice that mkdir refuses."""
    folder = Path(V1).parent
    folder.rmdir()
    folder.symlink_to("/nowhere")
    assert broken().what == f"{folder} is a link to nowhere (/nowhere)"
    assert broken().advice.startswith(f"rm {folder} && mkdir -p {folder} && ln -s /path/to/sd-v1-4.ckpt ")


def test_safety_checker(place: Path) -> None:
    folder = place / doctor.SAFETY_FOLDER
    assert one(doctor.safety_checker()).state == "note"
    folder.symlink_to("/nowhere")
    assert "not complete" in one(doctor.safety_checker()).what
    folder.unlink()
    folder.mkdir()
    (folder / "config.json").write_text("{")
    assert "not complete" in one(doctor.safety_checker()).what
    torch.save({"concept_embeds": torch.zeros(17, 8)}, folder / "pytorch_model.bin")
    assert "config.json is not JSON" in one(doctor.safety_checker()).what
    (folder / "config.json").write_text("{}")
    assert str(one(doctor.safety_checker())).endswith("pytorch_model.bin: 1 tensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / "model.safetensors")
    assert str(one(doctor.safety_checker())).endswith("model.safetensors: 2 tensors")
    (folder / "model.safetensors").write_text(LFS_POINTER)
    assert "git-LFS pointer" in next(f.what for f in doctor.examine("out") if f.what.startswith("safety"))
