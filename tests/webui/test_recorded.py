import json
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import InputError
from ldm.images.metadata import encode_image
from ldm.pipeline.infotext import image_texts
from ldm.pipeline.request import ImageRequest
from ldm.webui.controls import request_of
from ldm.webui.files import Files
from ldm.webui.recorded import read_dropped
from ldm.webui.tasks import ENLARGE, IMAGE, OVER_DEPTH, PAINT, TEXT

FILES = Files(loras={"ink.safetensors": "loras/ink.safetensors"}, embeddings={"toy.pt": "words/toy.pt"})


def written(path: Path, settings: dict, format: str = "png") -> Path:
    texts = image_texts({"width": 64, "height": 64, **settings})
    path.write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8), texts, format))
    return path


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_the_settings_of_an_image_make_it_again(tmp_path: Path, format: str) -> None:
    request = ImageRequest("a cube", "grey", 64, 128, "euler", seed=2**62, steps=9, scale=3.5, eta=None)
    found = read_dropped(written(tmp_path / "a", request.settings(), format), FILES, 1000)
    assert (found.task, found.notes) == (TEXT, ())
    assert request_of(found.task, found.held, {}) == request


@pytest.mark.parametrize(
    ("settings", "task", "note"),
    [
        ({"init_img": "castle.png", "strength": 0.5}, IMAGE, "it was made from castle.png"),
        ({"init_img": "a.png", "mask": "m.png", "strength": 1.0}, PAINT, "made from m.png"),
        ({"init_img": "a.png", "noise_level": 20}, ENLARGE, "it was made from a.png"),
        ({"depth": "d.png"}, OVER_DEPTH, "drop that into Depth map"),
    ],
)
def test_the_task_is_the_one_that_made_it(tmp_path: Path, settings: dict, task: object, note: str) -> None:
    found = read_dropped(written(tmp_path / "a", {"prompt": "a cube", **settings}), FILES, 1000)
    assert found.task is task
    assert any(note in one for one in found.notes)


def test_files_are_chosen_by_their_names_alone(tmp_path: Path) -> None:
    settings = {
        "prompt": "x",
        "lora": ["/elsewhere/ink.safetensors:0.5", "other.pt"],
        "embedding": ["../toy.pt", "z.pt"],
    }
    found = read_dropped(written(tmp_path / "a", settings | {"control": ["net.pth:edges.png"]}), FILES, 1000)
    assert (found.loras, found.embeddings) == ({"ink.safetensors": "0.5"}, ("toy.pt",))
    assert len(found.notes) == 3


def test_the_text_of_another_tool_is_read(tmp_path: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(
        "parameters",
        "a (red:1.2) cube <lora:ink:0.7>\nNegative prompt: grey\n"
        "Steps: 12, Sampler: DPM++ 2M Karras, CFG scale: 6, Seed: 5, Size: 64x64, Version: v1.10.1",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    found = read_dropped(tmp_path / "a.png", FILES, 1000)
    held = found.held
    assert (held["prompt"], held["negative_prompt"]) == ("a (red:1.2) cube", "grey")
    assert (held["sampler"], held["schedule"], held["steps"]) == ("dpmpp_2m", "karras", "12")
    assert (held["prompt_syntax"], found.loras) == ("a1111", {"ink.safetensors": "0.7"})


@pytest.mark.parametrize("data", [b"no image", encode_image(np.zeros((8, 8, 3), np.uint8), None)])
def test_an_image_without_settings_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png") as caught:
        read_dropped(tmp_path / "a.png", FILES, 1000)
    assert str(tmp_path) not in str(caught.value)


def test_nonsense_in_a_file_is_only_noted(tmp_path: Path) -> None:
    settings = {"prompt": "x", "steps": "<script>", "seed": -4, "sampler": ["a"], "lora": [":::"]}
    data = encode_image(np.zeros((8, 8, 3), np.uint8), ("", json.dumps(settings | {"scale": 1e99})))
    (tmp_path / "a.png").write_bytes(data)
    found = read_dropped(tmp_path / "a.png", FILES, 1000)
    assert len(found.notes) == 5
    assert request_of(TEXT, found.held, {}) == ImageRequest("x", eta=0.0)


def test_a_bomb_is_refused_by_the_limit_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message was Pillow's, with Pillow's limit."""
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    Image.new("1", (500, 100)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^a\.png has too many pixels; --max_pixels allows 1,000$"):
        read_dropped(tmp_path / "a.png", FILES, 1000)
