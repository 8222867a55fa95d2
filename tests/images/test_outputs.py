import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_files import case
from PIL import Image

from ldm.errors import InputError
from ldm.images.metadata import a1111_parameters, read_metadata
from ldm.images.outputs import OutputFolder, Watermarker

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "prompt": "a cat",
    "negative_prompt": "",
    "steps": 50,
    "sampler": "plms",
    "scale": 7.5,
    "seed": 42,
    "width": 512,
    "height": 256,
    "checkpoint": "/home/ann/models/sd-v1-4.ckpt",
    "config": "configs/stable-diffusion/v1-inference.yaml",
    "model_hash": "fe4efff1e1",
}


def image(height: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(outdir: Path) -> str:
    return OutputFolder(outdir).save_image(image(), SETTINGS).name


def files(outdir: Path) -> list[str]:
    """Every file below, hidden ones too."""
    return sorted(str(path.relative_to(outdir)) for path in outdir.rglob("*") if path.is_file())


def start_writer(outdir: Path, count: int, link: str = "os.link") -> subprocess.Popen:
    """A process that saves tiny images and prints each name; it begins on a line from stdin."""
    script = f"""
import errno, os, sys
import numpy as np
from ldm.images.outputs import OutputFolder
def no_links(*_): raise OSError(errno.EPERM, "Operation not permitted")
os.link = {link}
folder = OutputFolder(sys.argv[1])
sys.stdin.readline()
for index in range({count}):
    settings = dict(prompt=f"{{os.getpid()}} {{index}}", width=64, height=64)
    image = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    print(folder.save_image(image, settings).name, flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, outdir],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# --- names


def test_names_of_the_original(tmp_path):
    outdir = tmp_path / "a" / "b"
    folder = OutputFolder(outdir)
    pixels = image()
    paths = [folder.save_image(pixels, SETTINGS), folder.save_image(pixels, SETTINGS)]
    paths.append(folder.save_grid(pixels, SETTINGS))
    assert files(outdir) == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    assert paths == [outdir / "samples/00000.png", outdir / "samples/00001.png", outdir / "grid-0000.png"]
    for path in paths:
        assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_a_deleted_file_does_not_cause_an_overwrite(tmp_path):
    """The original counted the files in the folder: with an early one deleted, it wrote over the last one."""
    folder = OutputFolder(tmp_path)
    for seed in range(3):
        folder.save_image(image(seed=seed), SETTINGS)
        folder.save_grid(image(seed=seed), SETTINGS)
    (tmp_path / "samples/00000.png").unlink()
    (tmp_path / "grid-0000.png").unlink()

    folder = OutputFolder(tmp_path)
    assert folder.save_image(image(), SETTINGS).name == "00003.png"
    assert folder.save_grid(image(), SETTINGS).name == "grid-0003.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples/00002.png")), image(seed=2))


def test_foreign_files_do_not_shift_the_numbers(tmp_path):
    """The original counted them as images and grids."""
    (tmp_path / "samples").mkdir()
    for name in (
        "notes.txt",
        "00003.gif",
        "abc.png",
        "00007 copy.png",
        "00005.png.bak",
        "7.png",
        "x00009.png",
        "٠٠٠٠٨.png",
    ):
        (tmp_path / "samples" / name).touch()
        (tmp_path / f"grid-{name}").touch()
    (tmp_path / "00012.png").touch()

    folder = OutputFolder(tmp_path)
    assert folder.save_image(image(), SETTINGS).name == "00000.png"
    assert folder.save_grid(image(), SETTINGS).name == "grid-0000.png"


def test_numbers_of_more_digits(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/99999.png").touch()
    (tmp_path / "grid-9999.png").touch()
    folder = OutputFolder(tmp_path)
    assert [folder.save_image(image(), SETTINGS).name for _ in range(2)] == ["100000.png", "100001.png"]
    assert folder.save_grid(image(), SETTINGS).name == "grid-10000.png"
    assert save(tmp_path) == "100002.png"


def test_files_have_the_users_permissions(tmp_path):
    folder = OutputFolder(tmp_path)
    previous = os.umask(0o022)
    try:
        path = folder.save_image(image(), SETTINGS)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644


# --- several writers, and interruptions


@pytest.mark.parametrize("link", ["os.link", "no_links"])
def test_two_processes_lose_nothing(tmp_path, link):
    """Two runs of the original into one folder wrote over each other's images."""
    writers = [start_writer(tmp_path, 30, link) for _ in range(2)]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    names = [name for writer in writers for name in writer.communicate()[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]

    expected = [f"{number:05d}.png" for number in range(60)]
    assert sorted(names) == expected
    assert files(tmp_path / "samples") == expected
    prompts = {read_metadata(tmp_path / "samples" / name)["prompt"] for name in expected}
    assert len(prompts) == 60


def test_a_killed_process_leaves_whole_images_only(tmp_path):
    for _ in range(4):
        writer = start_writer(tmp_path, 10_000)
        writer.stdin.write("go\n")
        writer.stdin.flush()
        for _ in range(5):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL

    paths = sorted((tmp_path / "samples").glob("[0-9]*"))
    assert len(paths) >= 20
    assert [path.name for path in paths] == [f"{number:05d}.png" for number in range(len(paths))]
    for path in paths:
        assert Image.open(path).convert("RGB").size == (64, 64)


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_an_interrupted_save_leaves_no_file(tmp_path, monkeypatch, call):
    folder = OutputFolder(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.save_image(image(), SETTINGS)
    assert files(tmp_path) == []


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = OutputFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=rf"{tmp_path}/samples: No space left"):
            folder.save_image(image(), SETTINGS)
    assert files(tmp_path) == []
    assert folder.save_image(image(), SETTINGS).name == "00000.png"


def test_folders_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    """The original found out at the first image, minutes later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/samples").write_text("mine")
    for outdir, message in [
        ("file", f"{tmp_path}/file: a file has that name"),
        ("file/below", f"{tmp_path}/file/below: Not a directory"),
        ("folder", f"{tmp_path}/folder/samples: a file has that name"),
        ("x" * 300, "x: File name too long"),
    ]:
        with pytest.raises(InputError, match=rf"cannot write to .*{message}; choose another --outdir"):
            OutputFolder(outdir)
    assert files(tmp_path) == ["file", "folder/samples"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_takes_no_files_is_refused():
    """It exists, and root may do anything: only trying shows it."""
    with pytest.raises(InputError, match="cannot write to /proc: "):
        OutputFolder("/proc")


def test_a_run_lists_the_folder_once(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path)
    monkeypatch.delattr(os, "listdir")
    monkeypatch.delattr(os, "scandir")
    assert [folder.save_image(image(), SETTINGS).name for _ in range(2)] == ["00000.png", "00001.png"]


# --- settings inside the file


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "",
        'say "hi", it\'s: 8k\\n, {"a": 1}',
        "first\nsecond\r\n\n  third\nSteps: 3",
        "café, naïve",
        "夜のカフェテラス 🎸 \u200b",
        "x" * 20_000,
    ],
)
def test_prompts_come_back(tmp_path, prompt):
    settings = SETTINGS | {"prompt": prompt, "negative_prompt": prompt}
    path = OutputFolder(tmp_path).save_image(image(), settings)
    metadata = read_metadata(path)
    assert metadata["prompt"] == metadata["negative_prompt"] == prompt
    text = Image.open(path).text["parameters"]
    assert text == a1111_parameters(metadata)
    assert text.startswith(prompt)


def test_a_prompt_in_a_broken_encoding_does_not_cost_the_image(tmp_path):
    """Python makes lone surrogates of command-line bytes that are not UTF-8."""
    path = OutputFolder(tmp_path).save_image(image(), SETTINGS | {"prompt": "caf\udce9"})
    assert read_metadata(path)["prompt"] == "caf\udce9"
    assert Image.open(path).text["parameters"].startswith("caf?\n")


def test_settings_come_back_without_the_users_folders(tmp_path):
    settings = SETTINGS | {"index": 3, "eta": None, "init_img": "../x/y.jpg", "weights": "ema"}
    path = OutputFolder(tmp_path).save_image(image(), settings)
    assert read_metadata(path) == settings | {
        "checkpoint": "sd-v1-4.ckpt",
        "config": "v1-inference.yaml",
        "init_img": "y.jpg",
    }
    assert b"home" not in path.read_bytes()


def test_files_without_settings(tmp_path):
    Image.fromarray(image()).save(tmp_path / "plain.png")
    Image.fromarray(image()).save(tmp_path / "photo.jpg")
    assert read_metadata(tmp_path / "plain.png") is None
    assert read_metadata(tmp_path / "photo.jpg") is None
    with pytest.raises(InputError, match=r"cannot read the picture .*nowhere\.png: No such file"):
        read_metadata(tmp_path / "nowhere.png")


def test_parameters_are_those_of_the_web_ui():
    assert a1111_parameters(SETTINGS | {"negative_prompt": "blurry, dark"}) == (
        "a cat\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x256, "
        "Model hash: fe4efff1e1, Model: sd-v1-4"
    )
    minimal = {"prompt": "a cat", "width": 8, "height": 8}
    assert a1111_parameters(minimal) == "a cat\nSize: 8x8"
    assert "Sampler: DPM++ 2M, Schedule type: Karras" in a1111_parameters(
        minimal | {"sampler": "dpmpp_2m", "schedule": "karras"}
    )
    assert "Sampler: a_new_one" in a1111_parameters(minimal | {"sampler": "a_new_one"})
    assert "Denoising strength: 0, Eta: 0.5" in a1111_parameters(minimal | {"strength": 0, "eta": 0.5})
    assert "Model: stable-diffusion-2.1" in a1111_parameters(
        minimal | {"checkpoint": "models/stable-diffusion-2.1/"}
    )


def test_other_tools_can_parse_the_parameters():
    """With the pattern of AUTOMATIC1111's `parse_generation_parameters`."""
    text = a1111_parameters(SETTINGS | {"checkpoint": 'my "best", v2: final.safetensors'})
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    fields = dict(re.findall(pattern, text.splitlines()[-1]))
    assert fields["Model"] == r'"my \"best\", v2: final"'
    assert fields["Model hash"] == "fe4efff1e1"
    assert fields["Steps"] == "50"


# --- watermark


def decode(pixels: np.ndarray, length: int) -> bytes:
    from imwatermark import WatermarkDecoder

    return WatermarkDecoder("bytes", 8 * length).decode(np.ascontiguousarray(pixels[..., ::-1]), "dwtDct")


def test_watermark_is_the_originals():
    tensors, _ = case("txt2img_plms")
    pixels, expected = np.asarray(tensors["image_0"]), np.asarray(tensors["watermarked_0"])
    before = pixels.copy()
    marked = Watermarker()(pixels)
    assert np.array_equal(marked, expected)
    assert np.array_equal(pixels, before)
    assert marked.flags.c_contiguous


@pytest.mark.parametrize("message", ["StableDiffusionV1", "SDV2"])
@pytest.mark.parametrize("size", [(512, 512), (256, 256), (264, 520)])
def test_watermark_can_be_read_from_the_file(tmp_path, message, size):
    """From a grey picture; it loses bits in strong colours, with the original's own code as well."""
    grey = np.random.default_rng(0).integers(64, 192, size, dtype=np.uint8)
    pixels = np.stack([grey, grey, grey], axis=-1)
    path = OutputFolder(tmp_path).save_image(Watermarker(message)(pixels), SETTINGS)
    assert decode(np.asarray(Image.open(path)), len(message)) == message.encode()


def test_images_too_small_for_the_watermark_are_told_apart():
    """The original crashed at the first save of a run below 256 x 256 pixels."""
    assert [Watermarker.fits(*size) for size in [(256, 256), (128, 512), (248, 256), (64, 64)]] == [
        1,
        1,
        0,
        0,
    ]
    assert Watermarker()(image(128, 512)).shape == (128, 512, 3)


def test_a_watermark_that_cannot_be_written_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(InputError, match=r"pip install invisible-watermark.*--watermark none"):
        Watermarker()
    with pytest.raises(InputError, match="message is empty"):
        Watermarker("")


def test_none_of_these_modules_imports_torch():
    code = "import sys, ldm.images, ldm.outputs, ldm.prompts; print({'torch', 'cv2'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
