"""The `data:` section and its complaints."""

from typing import Any

import pytest

from ldm.errors import InputError
from ldm.training.data.config import DataConfig, data_config

SECTION = {"train": {"target": "ldm.scenes.source.Scenes", "params": {}}, "size": 64}


def test_a_section_of_little_has_the_usual_values() -> None:
    data = data_config(SECTION)
    assert data == DataConfig(train=SECTION["train"], size=64)
    assert (data.crop, data.flip, data.latents, data.workers) == ("center", 0.0, False, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": 3}, "DataConfig has no parameter 'sise'; did you mean 'size'?"),
        ({"size": "big"}, "data: size must be a whole number of at least 8, not 'big'"),
        ({"size": 0}, "data: size must be a whole number of at least 8, not 0"),
        ({"size": True}, "data: size must be a whole number of at least 8, not True"),
        ({"flip": 1.5}, "data: flip must be a number from 0 to 1, not 1.5"),
        ({"crop": "middle"}, "data: crop must be center or random, not 'middle'"),
        ({"train": "images"}, "data: train must be a source's target and params, not 'images'"),
        ({"validation": {"params": {}}}, "data: validation must be a source's target and params, not"),
        ({"buckets": "yes"}, "data: buckets must be true or false, not 'yes'"),
        ({"filters": [">= 5"]}, "data: filters must be columns and conditions"),
        ({"patch": 128}, "data: patch must be at most size, 64, not 128"),
        ({"patch": 32, "buckets": True}, "data: patch and buckets do not go together"),
        ({"workers": -1}, "data: workers must be a whole number of at least 0, not -1"),
        ({"cache": ""}, "data: cache must be the path of a folder, not ''"),
        ({"masks": 3}, "data: masks must be true, false or the parameters of random masks, not 3"),
        ({"masks": {"widst": 3}}, "RandomMasks has no parameter 'widst'; did you mean 'widest'?"),
        ({"masks": {"boxes": -1}}, "data: masks: boxes must be a number of at least 0, not -1"),
        ({"masks": {"everything": 2}}, "data: masks: everything must be a number from 0 to 1, not 2"),
        ({"masks": {"boxes": 0, "strokes": 0}}, "data: masks: strokes and boxes cannot both be 0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        data_config(SECTION | change)
    assert str(error.value).startswith(message)


def test_missing_keys_are_named() -> None:
    with pytest.raises(InputError, match="the data: section lacks train, size"):
        data_config({})


def test_sizes_are_multiples_of_the_first_stages_factor() -> None:
    data_config(SECTION | {"patch": 32}).check_factor(8)
    with pytest.raises(InputError, match="data: size must be a multiple of 48, the factor of"):
        data_config(SECTION).check_factor(48)
    with pytest.raises(InputError, match=r"data: bucket_step must be a multiple of 32, .*, not 8"):
        data_config(SECTION | {"buckets": True, "bucket_step": 8}).check_factor(32)
