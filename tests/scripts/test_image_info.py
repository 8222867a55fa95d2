"""scripts/image_info.py on real files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import SCRIPTS, script
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import entry
from ldm.images.metadata import encode_image
from ldm.images.watermark import Watermarker
from ldm.pipeline.infotext import image_texts

SETTINGS = {
    "prompt": "a cat\nat \x1b[31mnight",
    "sampler": "plms",
    "seed": 7,
    "width": 256,
    "height": 256,
    "model_hash": "fe4efff1e1",
    "nsfw_content_detected": True,
}


@pytest.fixture
def info(monkeypatch, capsys):
    """Runs the command; gives exit code, lines of stdout and lines of stderr."""

    def run(*argv: object) -> tuple[int, list[str], list[str]]:
        words = [str(SCRIPTS / "image_info.py"), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", words)
        code = entry.run(script("image_info").main)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    path = tmp_path / "00000.png"
    path.write_bytes(encode_image(Watermarker()(image), image_texts(SETTINGS), "png"))
    return path


def plain(path: Path, size: int = 64) -> Path:
    Image.new("L", (size, 8)).save(path)
    return path


def test_text(info, made):
    assert info(made) == (
        0,
        [
            f"{made}: 256x256",
            "  seed: 7",
            "  model_hash: fe4efff1e1",
            "  watermark: StableDiffusionV1",
            "  digital source type: trainedAlgorithmicMedia",
            "  c2pa: none",
            "  safety: flagged",
            r"  prompt: a cat\nat \x1b[31mnight",
            "  height: 256",
            "  sampler: plms",
            "  width: 256",
        ],
        [],
    )


def test_an_image_without_settings(info, tmp_path):
    path = plain(tmp_path / "plain.webp")
    none = ("seed", "model_hash", "watermark", "digital source type", "c2pa")
    expected = [*(f"{name}: none" for name in none), "safety: not checked", "no settings"]
    assert info(path) == (0, [f"{path}: 64x8", *(f"  {line}" for line in expected)], [])


def test_json_is_one_line_for_each_file(info, made, tmp_path):
    other = plain(tmp_path / "plain.jpg")
    code, out, err = info("--json", made, other)
    assert (code, err) == (0, [])
    facts = {"seed": 7, "model_hash": "fe4efff1e1", "watermark": "StableDiffusionV1"}
    nothing = dict.fromkeys([*facts, "digital_source_type", "nsfw_content_detected", "settings"])
    no_manifest = {"c2pa": {"state": "none"}}
    facts |= {"digital_source_type": "trainedAlgorithmicMedia"}
    assert [json.loads(line) for line in out] == [
        {"file": str(made), "width": 256, "height": 256}
        | facts
        | {"nsfw_content_detected": True, "settings": SETTINGS}
        | no_manifest,
        {"file": str(other), "width": 64, "height": 8} | nothing | no_manifest,
    ]


def test_unreadable_files_are_a_line_each_and_the_others_go_on(info, made, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    bad = [tmp_path / "text.png", tmp_path / "nowhere.png", tmp_path]
    code, out, err = info("--json", *bad, made)
    assert (code, len(out)) == (1, 1)
    assert [line.split(":")[:2] for line in err] == [["image_info.py", " error"]] * 3
    assert all(f"cannot read the image {path}: " in line for path, line in zip(bad, err, strict=True))
    code, out, err = info(*bad)
    assert (code, out, len(err)) == (2, [], 3)


def test_malformed_settings_leave_the_other_facts(info, tmp_path):
    path = tmp_path / "image.png"
    chunks = PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: many")
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    code, out, err = info("--json", path)
    facts = json.loads(out[0])
    assert code == 1
    assert facts["settings"] is None
    assert "Steps: 'many', which is not a whole number" in facts["error"]
    assert err == [f"image_info.py: error: {facts['error']}"]


def test_the_web_uis_settings(info, tmp_path):
    path = tmp_path / "image.jpg"
    block = Image.Exif()
    text = "a cat\nSteps: 3, Sampler: Euler a, Seed: 5, Model hash: abc"
    block.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(path, exif=block)
    code, out, _ = info("--json", path)
    facts = json.loads(out[0])
    assert (code, facts["seed"], facts["model_hash"]) == (0, 5, "abc")
    assert facts["settings"]["sampler"] == "euler_ancestral"


def test_a_message_to_look_for(info, tmp_path):
    message = "a very long message of mine, really"
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    path = tmp_path / "image.jpg"
    path.write_bytes(encode_image(Watermarker(message)(image), None, "jpg"))
    assert info(path)[1][3] == "  watermark: none"
    code, out, _ = info(path, "--watermark", message)
    assert (code, out[3]) == (0, f"  watermark: {message}")


def test_the_message_that_the_settings_name(info, tmp_path):
    message = "a very long message of mine, really"
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    texts = image_texts(SETTINGS | {"watermark": message})
    path.write_bytes(encode_image(Watermarker(message)(image), texts))
    assert info(path)[1][3] == f"  watermark: {message}"


def test_usage(info):
    code, out, err = info()
    assert (code, out) == (2, [])
    assert err == ["image_info.py: error: the following arguments are required: FILE"]


def test_nothing_slow_is_imported(made):
    """Help needs neither numpy nor Pillow, and no image needs torch or the watermark package."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import image_info
try:
    image_info.main(["--help"])
except SystemExit:
    pass
print({{"torch", "numpy", "PIL", "cv2"}} & {{*sys.modules}})
image_info.main([{str(made)!r}])
print({{"torch", "cv2", "imwatermark"}} & {{*sys.modules}})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines().count("set()") == 2


def test_signatures(info, made, tmp_path):
    pytest.importorskip("c2pa")
    from certificates import Authority

    from ldm.images.provenance import signer_of

    authority = Authority()
    sign = signer_of(*authority.files(tmp_path))
    data = sign(made.read_bytes(), "png", SETTINGS | {"checkpoint": "m\x1b[31m"})
    made.write_bytes(data)
    (tmp_path / "trust.pem").write_bytes(authority.pem)
    stated = [
        "    generator: stable-diffusion-toolkit 0.1.0",
        "    source_type: trainedAlgorithmicMedia",
        r"    model: m\x1b[31m",
        "    model_hash: fe4efff1e1",
    ]
    signed = "  c2pa: valid, signed by Test signer, Tests"
    code, out, err = info(made)
    assert (code, err) == (0, [])
    assert out[5:10] == [f"{signed}; the certificate is not known to be trusted", *stated]
    assert info(made, "--trust", tmp_path / "trust.pem")[1][5:10] == [f"{signed}; trusted", *stated]
    code, out, _ = info("--json", made, "--trust", tmp_path / "trust.pem")
    facts = json.loads(out[0])
    assert (code, facts["c2pa"]["state"], facts["settings"]["seed"]) == (0, "trusted", 7)

    image = np.array(Image.open(made))
    image[0, 0] ^= 1
    start = data.index(b"caBX") - 4
    manifest = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    other = encode_image(image, image_texts(SETTINGS))
    made.write_bytes(other[:33] + manifest + other[33:])
    code, out, err = info(made, "--trust", tmp_path / "trust.pem")
    altered = "altered (the file's pixels or texts), signed by Test signer, Tests"
    assert code == 1
    assert f"  c2pa: {altered}" in out
    assert err == [f"image_info.py: error: {made}: its C2PA manifest is {altered}"]


def test_who_is_trusted_must_be_readable(info, made, tmp_path):
    pytest.importorskip("c2pa")
    code, out, err = info(made, "--trust", made)
    assert (code, out) == (2, [])
    assert err == [f"image_info.py: error: --trust {made}: this file holds no certificate in PEM form"]
    missing = tmp_path / "nowhere.pem"
    code, out, err = info(made, "--trust", missing)
    assert (code, err) == (2, [f"image_info.py: error: --trust {missing}: No such file or directory"])
