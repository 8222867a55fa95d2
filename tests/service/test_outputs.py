import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import pixels
from PIL import Image
from tiny_service import request

from ldm.images.watermark import Watermarker
from ldm.pipeline.infotext import read_metadata
from ldm.pipeline.pipeline import Pipeline
from ldm.runs.manifest import MANIFEST, read_manifest
from ldm.service.errors import ServiceError
from ldm.service.outputs import Keeper, encoded


@pytest.fixture(scope="module")
def pipeline(model: tuple[Path, Path]) -> Pipeline:
    config, weights = map(str, model)
    return Pipeline.load(weights, config, safety="off")


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_an_answer_is_the_file_that_save_writes(pipeline: Pipeline, tmp_path: Path, format: str) -> None:
    (image,) = pipeline.generate([request()])
    image.save(tmp_path / f"saved.{format}")
    assert encoded(image, format) == (tmp_path / f"saved.{format}").read_bytes()


def test_an_answer_has_the_watermark(pipeline: Pipeline) -> None:
    (image,) = pipeline.generate([request(height=256, width=256, steps=1)])
    found = np.asarray(Image.open(io.BytesIO(encoded(image))))
    assert np.array_equal(found, Watermarker.of("StableDiffusionV1")(image.pixels))
    assert not np.array_equal(found, image.pixels)


def test_an_answer_is_signed(pipeline: Pipeline) -> None:
    (image,) = pipeline.generate([request()])

    def signer(data: bytes, format: str, settings: dict) -> bytes:
        return f"{format} {settings['seed']} ".encode() + data

    assert encoded(image, "webp", signer) == b"webp 7 " + encoded(image, "webp")


def test_of_a_nan_image_there_is_no_file() -> None:
    with pytest.raises(ServiceError, match="NaN"):
        encoded(SimpleNamespace(pixels=None))


def test_images_are_kept_with_their_lines(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00004.png").write_bytes(b"another's")
    images = list(pipeline.generate([request(seed=1), request(seed=2)]))
    keeper = Keeper(str(tmp_path))
    lines = keeper.keep(SimpleNamespace(id="some job"), images)
    assert [line["file"] for line in lines] == ["samples/00005.png", "samples/00006.png"]
    assert list(read_manifest(tmp_path)) == json.loads(json.dumps(lines))
    for line, image in zip(lines, images, strict=True):
        assert line["job"] == "some job"
        assert line["run"] == keeper.run
        assert line["checkpoint"] == "tiny.safetensors"  # without its folder
        settings = read_metadata(tmp_path / line["file"])
        assert settings.items() <= line.items()
        assert settings["seed"] == image.seed
        assert np.array_equal(pixels(tmp_path / line["file"]), image.pixels)
    assert (tmp_path / "samples" / "00004.png").read_bytes() == b"another's"


def test_services_may_share_a_folder(pipeline: Pipeline, tmp_path: Path) -> None:
    images = list(pipeline.generate([request(seed=k, steps=1) for k in range(3)]))
    keepers = [Keeper(str(tmp_path)) for _ in range(3)]

    def keep(keeper: Keeper) -> None:
        for _ in range(3):
            keeper.keep(SimpleNamespace(id="job"), images)

    threads = [threading.Thread(target=keep, args=(keeper,)) for keeper in keepers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines) == 27
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(
        Path(line["file"]).name for line in lines
    )
    for line in lines:
        assert read_metadata(tmp_path / line["file"])["seed"] == line["seed"]
