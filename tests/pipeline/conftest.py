import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.errors import InputError
from ldm.modules.encoders import modules as encoders
from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions

CLIPTokenizer = functools.cache(encoders.CLIPTokenizer)  # it takes longer to make than a tiny image
Load = Callable[..., Pipeline]


@pytest.fixture
def load(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Load:
    """Makes pipelines of the miniature, whose images have 16x16 pixels, on the CPU."""
    monkeypatch.setattr(encoders, "CLIPTokenizer", CLIPTokenizer)

    def call(config: Path | None = None, weights: Path | None = None, **options: object) -> Pipeline:
        options = RuntimeOptions(**{"device": "cpu", "eager": True} | options)
        return Pipeline.load(str(weights or model[1]), str(config or model[0]), options, safety="off")

    return call


@pytest.fixture
def reads_ahead() -> Callable[[Pipeline, ImageRequest, Path], None]:
    """Asserts that `read_images` reads all that a request takes from a file, and needs it."""

    def check(pipeline: Pipeline, request: ImageRequest, path: Path) -> None:
        request = pipeline.resolve(request)
        pipeline.forget_files()
        pipeline.read_images(request)
        path.unlink()
        ((image,),) = pipeline.batches([[request]])
        assert image.pixels is not None
        pipeline.forget_files()
        with pytest.raises(InputError, match=path.name):
            pipeline.read_images(request)

    return check
