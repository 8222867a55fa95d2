"""POST /score: AzureML's online contract."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_service import base64_png, live, pixels
from PIL import Image

from ldm.pipeline import pipeline as pipeline_module
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.safety import Safety
from ldm.service.engine import Engine


@pytest.fixture(scope="module")
def served(model: tuple[Path, Path]) -> Iterator[tuple[httpx.Client, Engine]]:
    with live(model, max_images=4) as (url, engine), httpx.Client(base_url=url, timeout=600) as client:
        yield client, engine


@pytest.fixture(scope="module")
def reference(model: tuple[Path, Path]) -> Pipeline:
    return Pipeline.load(str(model[1]), str(model[0]), safety="off")


def score(client: httpx.Client, columns: Sequence[str], data: Any, **parts: Any) -> httpx.Response:
    parameters = {"num_inference_steps": 2} | parts.pop("parameters", {})
    table = {"columns": list(columns), "data": data, "parameters": parameters, **parts}
    return client.post("/score", json={"input_data": table})


def images(response: httpx.Response) -> list[np.ndarray]:
    assert response.status_code == 200, response.text
    return [pixels(one["generated_image"]) for one in response.json()]


def test_answers_are_in_the_order_of_the_data(
    served: tuple[httpx.Client, Engine], reference: Pipeline
) -> None:
    data = [["a cat", 5], ["a dog", 9], ["a cow", 5]]
    response = score(served[0], ["prompt", "seed"], data, index=[0, 1, 2])
    answers = response.json()
    assert [list(one) for one in answers] == [["prompt", "generated_image", "nsfw_content_detected"]] * 3
    assert [one["prompt"] for one in answers] == ["a cat", "a dog", "a cow"]
    assert [one["nsfw_content_detected"] for one in answers] == [False] * 3
    wanted = reference.generate([ImageRequest(prompt, seed=seed, steps=2) for prompt, seed in data])
    for found, image in zip(images(response), wanted, strict=True):
        assert np.abs(found - image.pixels).max() <= 1


def test_guidance_is_used_only_above_one(served: tuple[httpx.Client, Engine], reference: Pipeline) -> None:
    def at(scale: float) -> np.ndarray:
        parameters = {"guidance_scale": scale, "seed": 3}
        return images(score(served[0], ["prompt"], ["a cat"], parameters=parameters))[0]

    (without,) = reference.generate([ImageRequest("a cat", seed=3, steps=2, scale=1.0)])
    (guided,) = reference.generate([ImageRequest("a cat", seed=3, steps=2, scale=4.0)])
    assert (without.pixels != guided.pixels).any()
    for scale in (-2, 0, 0.5, 1):
        assert np.abs(at(scale) - without.pixels).max() <= 1
    assert np.abs(at(4) - guided.pixels).max() <= 1


def test_further_columns(served: tuple[httpx.Client, Engine], reference: Pipeline) -> None:
    start = Image.effect_noise((64, 64), 90).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    line = ["a cat", "a dog", 3, base64_png(start), base64_png(mask)]
    columns = ["prompt", "negative_prompt", "seed", "image", "mask"]
    (found,) = images(score(served[0], columns, [line], parameters={"mask_blur": 0}, index=["x"]))
    (wanted,) = reference.generate(
        [
            ImageRequest(
                "a cat", "a dog", seed=3, steps=2, init_img=start, mask=mask, strength=1.0, mask_blur=0
            )
        ]
    )
    assert np.abs(found - wanted.pixels).max() <= 1
    assert np.array_equal(found[:, 32:], np.asarray(start)[:, 32:])
    assert (found[:, :32] != np.asarray(start)[:, :32]).any()


def test_an_index_of_its_own_is_repeated(served: tuple[httpx.Client, Engine]) -> None:
    found = score(served[0], ["prompt"], ["a cat", "a dog"], index=["x", 7]).json()
    assert [one["index"] for one in found] == ["x", 7]


@pytest.mark.parametrize("blacken", [True, False])
def test_what_is_unwanted_comes_as_a_black_image(
    served: tuple[httpx.Client, Engine], monkeypatch: pytest.MonkeyPatch, blacken: bool
) -> None:
    client, engine = served

    def second(found: Sequence[np.ndarray]) -> list[bool]:
        return [k == 1 for k in range(len(found))]

    pipeline = engine.models.pipeline("tiny")
    monkeypatch.setitem(pipeline.__dict__, "safety", Safety(second, blacken=blacken))
    response = score(client, ["prompt"], ["a cat", "a dog"])
    assert [one["nsfw_content_detected"] for one in response.json()] == [False, True]
    clean, black = images(response)
    assert clean.any()
    assert not black.any()
    assert clean.shape == black.shape


@pytest.mark.parametrize(
    ("columns", "data", "parts", "words"),
    [
        (["prompt"], [], {}, "data has no lines"),
        (["prompt"], ["a"] * 5, {}, "5 lines: a request may have 4 at most"),
        (["text"], ["a"], {}, "the column 'text' is not known"),
        (["prompt"], ["a", 3], {}, "data[1]: the prompt 3 is no text"),
        (["prompt", "seed"], [["a", 1], ["b"]], {}, "data[1]: 1 values for the 2 columns"),
        (["prompt"], ["a"], {"index": [0, 1]}, "index has 2 entries for 1 lines"),
        (["prompt", "image"], [["a", "no image!"]], {}, "data[0]: image: it is no base64"),
        (["prompt", "image"], [["a", "aW1hZ2U="]], {}, "data[0]: image: it is no image"),
        (["prompt", "image"], [["a", "/etc/passwd"]], {}, "data[0]: image: it is no"),
        (["prompt", "mask"], [["a", base64_png(Image.new("L", (8, 8)))]], {}, "data[0]: mask without image"),
        (
            ["prompt"],
            ["a"],
            {"parameters": {"num_inference_steps": 999}},
            "num_inference_steps: 999 are more",
        ),
        (["prompt", "H"], [["a", 16], ["b", 17]], {}, "data[1]: height 17 is not a multiple of 8"),
        (["prompt", "steps"], [["a", 1], ["b", 999]], {}, "data[1]: num_inference_steps: 999 are more"),
        (["prompt"], ["a"], {"parameters": {"sampler": "Eulr"}}, "Eulr is not known"),
        (["prompt"], ["\0"], {}, "NUL"),
    ],
)
def test_bad_input_is_named_in_the_contracts_form(
    served: tuple[httpx.Client, Engine], columns: list[str], data: Any, parts: dict[str, Any], words: str
) -> None:
    response = score(served[0], columns, data, **parts)
    assert response.status_code in (400, 413, 422)
    assert set(response.json()) == {"error_code", "message"}
    assert words in response.json()["message"]
    assert "\n" not in response.json()["message"]
    assert images(score(served[0], ["prompt"], ["a cat"]))  # the queue goes on


def test_a_line_that_fails_is_named(
    served: tuple[httpx.Client, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine said of a line did not say of which."""
    plain = pipeline_module.finite_images
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline_module, "finite_images", lambda x: [k != 1 and ok for k, ok in enumerate(plain(x))]
        )
        response = score(served[0], ["prompt"], ["a", "b", "c"])
    assert response.json()["message"].startswith("data[1]: the image came out as NaN")
    assert images(score(served[0], ["prompt"], ["a", "b", "c"]))


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        (
            {"parameters": {"num_inference_steps": 99999}},
            "parameters is beside input_data; it belongs inside it",
        ),
        ({"params": {"num_inference_steps": 3}}, "params has values; they belong into parameters"),
        ({"model": "tiny"}, "the request has 'model' beside input_data"),
    ],
)
def test_what_stands_beside_the_table_is_refused(
    served: tuple[httpx.Client, Engine], beside: dict[str, Any], words: str
) -> None:
    """It was dropped without a word: images had the default number of steps."""
    table = {"columns": ["prompt"], "data": ["a"], "parameters": {"steps": 1}}
    response = served[0].post("/score", json={"input_data": table, **beside})
    assert (response.status_code, response.json()["error_code"]) == (422, "INVALID_REQUEST")
    assert words in response.json()["message"]
    for empty in ({}, None):
        assert images(served[0].post("/score", json={"input_data": table, "params": empty}))


def test_models_are_chosen_by_name(served: tuple[httpx.Client, Engine]) -> None:
    body = {"input_data": {"columns": ["prompt"], "data": ["a"], "parameters": {"steps": 2}}}
    assert served[0].post("/score", params={"model": "tiny"}, json=body).status_code == 200
    unknown = served[0].post("/score", params={"model": "large"}, json=body)
    assert unknown.status_code == 404
    assert unknown.json() == {"error_code": "UNKNOWN_MODEL", "message": "no model 'large'; choose from tiny"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"input_data": NaN}', b'"a"'])
def test_malformed_json(served: tuple[httpx.Client, Engine], body: bytes) -> None:
    response = served[0].post("/score", content=body)
    assert response.status_code in (400, 422)
    assert set(response.json()) == {"error_code", "message"}


def test_half_characters_are_no_error_of_the_service(served: tuple[httpx.Client, Engine]) -> None:
    """JSON can express half of a surrogate pair, UTF-8 cannot."""

    def at(table: str) -> httpx.Response:
        return served[0].post("/score", content=b'{"input_data": {%s}}' % table.encode())

    assert at('"columns": ["prompt"], "data": ["\\ud800"]').status_code == 422
    assert at('"columns": ["\\ud800"], "data": ["a"]').status_code == 422
    scale = '"columns": ["prompt"], "data": ["a"], "parameters": {"guidance_scale": "\\ud800"}'
    assert at(scale).status_code == 422
    index = '"columns": ["prompt"], "data": ["a"], "index": ["\\ud800"], "parameters": {"steps": 1}'
    assert at(index).json()[0]["index"] == "\ud800"
