"""The tables of AzureML's scoring contract."""

import subprocess
import sys
from typing import Any

import pytest

from ldm.errors import InputError
from ldm.service.table import Table, answer, in_words, json_of, with_strength


def table(**parts: Any) -> Table:
    return Table.of({"input_data": {"columns": ["prompt"], "data": ["a cat"], **parts}})


def test_the_contract_as_documented() -> None:
    found = table(
        data=["a cat", "a dog"],
        index=[0, 1],
        parameters={"num_inference_steps": 50, "guidance_scale": 7.5},
    )
    assert [found.values(k) for k in range(len(found))] == [
        {"steps": 50, "scale": 7.5, "prompt": "a cat"},
        {"steps": 50, "scale": 7.5, "prompt": "a dog"},
    ]
    assert [found.label(k) for k in range(2)] == [None, None]
    assert answer("a cat", "aW1hZ2U=", None) == {
        "prompt": "a cat",
        "generated_image": "aW1hZ2U=",
        "nsfw_content_detected": False,
    }


@pytest.mark.parametrize(
    "data",
    [
        [["a cat", 3], ["a dog", 4]],
        [{"prompt": "a cat", "seed": 3}, {"seed": 4, "prompt": "a dog"}],
        {"prompt": ["a cat", "a dog"], "seed": [3, 4]},
    ],
)
def test_lines_in_each_of_their_forms(data: Any) -> None:
    found = table(columns=["prompt", "seed"], data=data)
    assert [found.values(k) for k in range(2)] == [
        {"prompt": "a cat", "seed": 3},
        {"prompt": "a dog", "seed": 4},
    ]


def test_an_object_is_the_values_of_one_line() -> None:
    """So a published client of the inpainting model sends them."""
    data = {"prompt": "a cat", "image": "aW1hZ2U=", "mask_image": "bWFzaw=="}
    found = table(columns=["prompt", "image", "mask_image"], data=data, index=[0])
    assert found.values(0) == {"prompt": "a cat", "init_img": "aW1hZ2U=", "mask": "bWFzaw=="}


@pytest.mark.parametrize(("scale", "used"), [(-3, 1), (0, 1), (1, 1), (1.01, 1.01), (7.5, 7.5), ("0.5", 1)])
def test_guidance_is_used_only_above_one(scale: Any, used: float) -> None:
    assert table(parameters={"guidance_scale": scale}).values(0)["scale"] == used


def test_a_lines_own_value_goes_over_the_parameter() -> None:
    found = table(
        columns=["prompt", "guidance_scale", "seed"],
        data=[["a cat", 3, None], ["a dog", None, 9], ["a cow", None, -1]],
        parameters={"scale": 5, "seed": 20},
    )
    values = [found.values(k) for k in range(3)]
    assert [one["scale"] for one in values] == [3, 5, 5]
    assert [one["seed"] for one in values] == [20, 9, 22]
    assert "seed" not in table(parameters={"seed": -1}).values(0)


def test_what_is_for_images_is_left_out_without_one() -> None:
    found = table(
        columns=["prompt", "image", "mask"],
        data=[["a cat", None, None], ["a cat", "aW1hZ2U=", None], ["a cat", "aW1hZ2U=", "bWFzaw=="]],
        parameters={"strength": 0.4, "mask_blur": 2},
    )
    image = {"init_img": "aW1hZ2U=", "strength": 0.4}
    assert found.values(0) == {"prompt": "a cat"}
    assert found.values(1) == {"prompt": "a cat"} | image
    assert found.values(2) == {"prompt": "a cat", "mask": "bWFzaw==", "mask_blur": 2} | image


def test_strengths_are_the_commands() -> None:
    image = {"init_img": "an image"}
    assert with_strength({}, "text") == {}
    assert with_strength(image, "text")["strength"] == 0.75
    assert with_strength(image, "depth")["strength"] == 0.9
    assert with_strength(image | {"mask": "a mask"}, "inpaint")["strength"] == 1.0
    assert with_strength(image, "upscale")["noise_level"] == 20
    assert with_strength(image | {"strength": 0.2}, "text")["strength"] == 0.2


def test_numbers_that_no_json_can_repeat_are_refused() -> None:
    """An index of 1e400 came back as Infinity."""
    for text in ("[1e400]", "[-1e400]", "[NaN]"):
        with pytest.raises(ValueError, match=r"no JSON|too large a number"):
            json_of(text)
    assert json_of("[1e3]") == [1000.0]


def test_an_index_that_says_something_is_repeated() -> None:
    found = table(data=["a cat", "a dog"], index=["x", 7])
    assert [found.label(k) for k in range(2)] == ["x", 7]
    assert answer("a cat", "", True, "x")["index"] == "x"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"columns": None}, "columns is no list of names"),
        ({"columns": "prompt"}, "columns is no list of names"),
        ({"columns": ["seed"]}, 'no column "prompt"'),
        ({"columns": ["prompt", "promt"]}, "'promt' is not known; there are prompt, negative_prompt"),
        ({"columns": ["prompt", "mask", "mask_image"]}, "mask and mask_image are one"),
        ({"columns": ["prompt", "rng"]}, "'rng' is not known"),
        ({"columns": ["prompt", "prompt"]}, "the columns prompt and prompt are one"),
        ({"data": "a cat"}, "data is no list"),
        ({"data": {"prompt": ["a"], "seed": 3}}, "columns that are lists and others that are not"),
        ({"data": {"prompt": ["a"], "seed": [1, 2]}}, "differ in their lengths: 'prompt' 1, 'seed' 2"),
        ({"index": [0, 1]}, "index has 2 entries for 1 lines"),
        ({"index": 0}, "index has no list"),
        ({"index": [[0]]}, "neither a number nor a text"),
        ({"parameters": [1]}, "parameters is no JSON object"),
        ({"parameters": {"num_steps": 3}}, "'num_steps' is not known; there are num_inference_steps"),
        ({"parameters": {"prompt": "a"}}, "'prompt' is not known"),
        ({"parameters": {"steps": 3, "num_inference_steps": 4}}, "given under two names"),
        ({"parameters": {"seed": "x"}}, "seed: x is not a whole number"),
        ({"rows": []}, "'rows', which is none of columns, data, index, parameters"),
    ],
)
def test_a_table_that_is_none(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        table(**parts)


def test_more_columns_than_there_can_be_are_refused_at_once() -> None:
    """Each of a table's columns was compared with all others: 800 took 0.02 s, and a body holds millions."""
    with pytest.raises(InputError, match=r"^2,000 columns are more than the \d+ names of settings$"):
        table(columns=["prompt"] * 2000)


@pytest.mark.parametrize("name", ["mask", "outpaint", "depth", "hires", "panorama"])
def test_a_model_that_enlarges_does_nothing_else(name: str) -> None:
    """The message was "mask and noise_level are for different models"; the noise level had been added."""
    with pytest.raises(InputError, match=f"{name} is not for this model, which enlarges an image as it is"):
        with_strength({"init_img": "an image", name: True, "strength": 0.5}, "upscale")
    values = {"init_img": "an image", name: None, "tiling": "none"}
    assert with_strength(values, "upscale")["noise_level"] == 20


@pytest.mark.parametrize(
    "content", [None, 3, [], {}, {"prompt": "a"}, {"input_data": None}, {"input_data": []}]
)
def test_a_request_without_a_table(content: Any) -> None:
    with pytest.raises(InputError, match="the form is"):
        Table.of(content)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([5, 3], "the prompt 5 is no text"),
        ([None, 3], "the prompt is missing"),
        (["a cat"], "1 values for the 2 columns prompt, guidance_scale"),
        ("a cat", "no list of values for the columns"),
        ({"prompt": "a cat", "seed": 3}, "'seed' is none of the columns"),
        (["a cat", "x"], "guidance_scale: x is not a number"),
    ],
)
def test_a_line_with_a_fault_leaves_the_others(line: Any, words: str) -> None:
    found = table(columns=["prompt", "guidance_scale"], data=[line, ["a dog", 3]])
    with pytest.raises(InputError) as error:
        found.values(0)
    assert words in in_words(error.value)
    assert found.values(1) == {"prompt": "a dog", "scale": 3}


def test_it_needs_neither_torch_nor_a_web_framework() -> None:
    code = "import sys, ldm.service.table; print({'torch', 'fastapi', 'starlette'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
