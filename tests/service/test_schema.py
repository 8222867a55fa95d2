import base64
import io
import json
from dataclasses import fields
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from PIL import Image

from ldm.fields import settings_of
from ldm.pipeline.request import ImageRequest
from ldm.runs.plan import plan_run
from ldm.service.errors import BadRequest, LimitExceeded, ServiceError
from ldm.service.options import ServiceOptions
from ldm.service.schema import RECORDED_ONLY, request_of, request_schema, series

OPTIONS = ServiceOptions(max_pixels=10_000, max_steps=40)


def image(size: tuple[int, int] = (16, 8)) -> str:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def read(values: dict | None = None, task: str = "text", **more: object) -> ImageRequest:
    return request_of({"prompt": "a", **(values or {}), **more}, OPTIONS, task=task)


def refused(words: str, values: dict | None = None, **more: object) -> None:
    with pytest.raises(BadRequest, match=words):
        read(values, **more)


# Values


def test_values_are_those_of_the_dataclass() -> None:
    given = {"steps": 12, "sampler": "Euler a", "seed": 7, "height": 64, "scale": 3, "sigmas": None}
    assert read(given) == ImageRequest("a", steps=12, sampler="Euler a", seed=7, height=64, scale=3.0)


def test_a_setting_has_all_of_its_names() -> None:
    assert read({"H": 64, "ddim_steps": 9, "init-img": image(), "strength": 0.5}).height == 64
    assert read({"H": 64, "ddim_steps": 9}) == read({"height": 64, "steps": 9})


def test_one_setting_under_two_names_is_refused() -> None:
    refused("H and height are one setting", {"H": 64, "height": 64})


def test_an_unknown_name_is_refused_and_the_nearest_is_named() -> None:
    refused("'promt' is no setting of an image; did you mean prompt?", promt="x")
    refused("'outdir' is no setting", outdir="/tmp")
    for name in RECORDED_ONLY:
        refused("is no setting", {name: "x"})


def test_the_prompt_is_needed() -> None:
    with pytest.raises(BadRequest, match="prompt: it is missing"):
        request_of({"seed": 1}, OPTIONS)
    with pytest.raises(BadRequest, match="prompt: it is missing"):
        request_of({"prompt": None}, OPTIONS)


def test_null_is_not_given_and_a_seed_of_minus_one_is_any() -> None:
    assert read(seed=-1, scale=None, steps=None) == ImageRequest("a")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps: 0 is not a whole number in range"),
        ({"steps": 1.5}, "steps: 1.5"),
        ({"steps": True}, "steps: True"),
        ({"steps": "many"}, "steps: many"),
        ({"steps": 10**400}, "steps: 1000"),
        ({"scale": {"x": 1}}, "scale: an object"),
        ({"scale": [1]}, "scale: "),
        ({"tiling": "z"}, "tiling: invalid choice"),
        ({"sampler": "nope"}, "sampler nope is not known"),
        ({"panorama": 1}, "panorama: 1 is not true or false"),
        ({"timesteps": [[1]]}, "timesteps: "),
        ({"timesteps": [1, 5]}, "timesteps: the list must fall"),
        ({"prompt": "\ud800"}, "prompt: the text has half"),
        ({"negative_prompt": 3}, "negative_prompt: 3 is no text"),
        ({"watermark": "\0"}, "watermark: the text has a NUL"),
        ({"strength": 0.5}, "strength 0.5 without init_img"),
        ({"hires_upscaler": "/etc/passwd"}, "hires_upscaler: this service has latent and lanczos"),
    ],
)
def test_values_that_are_wrong_are_one_line_that_names_the_field(values: dict, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as error:
        read(values)
    assert "\n" not in error.value.message


def test_long_lists_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="timesteps: 5,000 entries"):
        read(timesteps=list(range(5000)))


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "prompt_to"])
def test_long_texts_are_refused_before_they_are_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of any length were parsed, in quadratic time, and moderated before --max_prompt was looked at."""
    made = []
    monkeypatch.setattr(ImageRequest, "__post_init__", made.append)
    text = ("[a:b:" * 2001)[:10_001]
    words = f"^{name}: 10,001 characters are more than this service's 10,000$"
    with pytest.raises(LimitExceeded, match=words):
        request_of({"prompt": "a", name: text, "prompt_syntax": "a1111"}, OPTIONS)
    assert made == []


def test_a_series_is_that_of_a_run() -> None:
    """The images of one request all had the first one's variation seed, where a run's have their own."""
    request = ImageRequest("a", seed=7, variation_seed=2**63 - 1, variation_strength=0.5)
    run = plan_run([request.twin(seed=None)], 7, 3, 1, None).requests
    found = series(request, 3)
    assert [(one.seed, one.variation_seed) for one in found] == [(7, 2**63 - 1), (8, 0), (9, 1)]
    assert found == list(run)
    unseeded = series(request.twin(seed=None), 2)
    assert [(one.seed, one.variation_seed) for one in unseeded] == [(None, 2**63 - 1), (None, 0)]
    streamed = ImageRequest("a", seed=7, rng="compvis")
    assert series(streamed, 2) == [streamed] * 2


def test_what_is_no_single_value_is_refused_in_plain_words() -> None:
    """Messages had up to 500 characters of Python's form of it: "seed: ([[[[", "('a',) is no text"."""
    deep: list = []
    for _ in range(100):
        deep = [deep]
    refused("^seed: a list is no value for it$", seed=deep)
    refused("^timesteps: a list is no value for it$", timesteps=[deep])
    refused("^prompt: a list is no value for it$", {"prompt": ["a"]})
    refused("^prompt: a file is no value for it$", {"prompt": b"abc"})
    for values in ({"seed": "x" * 400}, {"seed": 10**400}, {"sampler": "x" * 400}, {"timesteps": "x" * 400}):
        with pytest.raises(BadRequest) as error:
            read(values)
        assert len(error.value.message) < 120
    assert read(timesteps=",".join(map(str, range(990, 0, -10)))).timesteps[0] == 990


# Images and files


def test_images_are_decoded_and_have_the_commands_strength() -> None:
    request = read(init_img=image())
    assert (np.asarray(request.init_img) == (255, 0, 0)).all()
    assert request.strength == 0.75
    assert read(init_img=image(), task="depth").strength == 0.9
    assert read(init_img=image(), mask=image()).strength == 1.0
    assert read(init_img=image(), strength=0.3).strength == 0.3
    upscaled = read(init_img=image(), task="upscale")
    assert (upscaled.noise_level, upscaled.strength) == (20, None)


def test_files_of_an_image_are_few_and_their_folder_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand ControlNets of a request had their images decoded at once, and listed the folder each."""
    (tmp_path / "one.safetensors").touch()
    options = ServiceOptions(lora_folder=str(tmp_path), control_folder=str(tmp_path))
    listed, plain = [], Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *given: listed.append(given) or plain(*given))
    request_of({"prompt": "a", "lora": ["one:0.5"] * 8}, options)
    assert len(listed) == 1
    entry = {"file": "one", "image": image()}
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    for values in ({"control": [entry] * 9}, {"lora": ["one"] * 9}, {"embedding": ["one"] * 9}):
        with pytest.raises(LimitExceeded, match="9 entries are more than 8"):
            request_of({"prompt": "a", **values}, options)
    properties = request_schema()["properties"]
    assert [properties[name]["maxItems"] for name in ("lora", "embedding", "control")] == [8] * 3


@pytest.mark.parametrize("name", ["init_img", "mask", "depth"])
def test_no_image_is_read_from_a_path_or_an_address(name: str, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(base64.b64decode(image()))
    for value in (str(path), f"file://{path}", "http://127.0.0.1:1/x.png"):
        refused(f"{name}: it is no", {name: value})


def test_an_image_beyond_the_limit_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="init_img: 200x100 has more pixels"):
        read(init_img=image((200, 100)))


def test_files_are_those_in_the_folders_of_the_options_by_plain_names(tmp_path: Path) -> None:
    for name in ("style.safetensors", "word.pt", "edges.safetensors"):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    options = ServiceOptions(lora_folder=folder, embedding_folder=folder, control_folder=folder)

    def files(**values: object) -> ImageRequest:
        return request_of({"prompt": "a", **values}, options)

    lora = files(lora=["style:0.5:0.25"]).loras[0]
    assert (Path(lora.file), lora.weight, lora.text_weight) == (tmp_path / "style.safetensors", 0.5, 0.25)
    assert files(lora="style").loras[0].weight == 1.0
    assert files(embedding="word").embedding == (f"{tmp_path}/word.pt:word",)
    assert files(embedding=["word.pt:thing"]).embedding == (f"{tmp_path}/word.pt:thing",)
    (control,) = files(control={"file": "edges", "image": image(), "end": 0.5}).controls
    assert (control.file, control.weight, control.end) == (f"{tmp_path}/edges.safetensors", 1.0, 0.5)
    assert control.image.size == (16, 8)
    wrong = [
        {"lora": "../style"},
        {"lora": f"{folder}/style.safetensors"},
        {"lora": "style:1:2:3"},
        {"lora": "style:heavy"},
        {"lora": 5},
        {"embedding": "/etc/passwd"},
        {"embedding": "word:..."},
        {"control": "edges:/etc/passwd"},
        {"control": {"file": "../edges", "image": image()}},
        {"control": {"file": "edges", "image": "/etc/passwd"}},
        {"control": {"file": "edges", "image": image(), "weight": 11}},
        {"control": {"file": "edges", "image": image(), "start": 0.5, "end": 0.5}},
        {"control": {"file": "edges", "image": image(), "folder": "/"}},
    ]
    for values in wrong:
        with pytest.raises(BadRequest, match=next(iter(values))):
            files(**values)


@pytest.mark.parametrize("name", ["lora", "embedding"])
def test_without_a_folder_there_are_no_files(name: str) -> None:
    refused(f"{name}: this service has none", {name: "x"})


# The schema


def test_the_schema_has_every_setting_that_clients_may_give() -> None:
    schema = request_schema(OPTIONS)
    names = {field.name for field in fields(ImageRequest)} - set(RECORDED_ONLY)
    assert set(schema["properties"]) == names
    assert all(each["description"] for each in schema["properties"].values())
    assert not any("--" in each["description"] for each in schema["properties"].values())
    json.dumps(schema, allow_nan=False)


def test_types_ranges_choices_and_defaults_are_the_fields_own() -> None:
    found = request_schema(OPTIONS)["properties"]
    assert found["steps"] | {"description": ""} == {
        "description": "",
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": OPTIONS.max_steps,
    }
    assert request_schema()["properties"]["steps"]["maximum"] == 1000
    assert found["tiling"]["enum"] == list(settings_of(ImageRequest)["tiling"].choices)
    assert found["cfg_rescale"]["default"] == 0.0
    assert found["init_img"]["contentEncoding"] == "base64"
    assert "ddim" in found["sampler"]["examples"]
    assert "also H" in found["height"]["description"]


def test_the_defaults_of_the_schema_are_those_of_the_request() -> None:
    schema = request_schema(OPTIONS)
    defaults = {name: each["default"] for name, each in schema["properties"].items() if "default" in each}
    jsonschema_rs.validator_for(schema).validate({"prompt": "a"} | defaults)
    assert read(defaults | {"prompt": "a"}) == ImageRequest("a")


@pytest.mark.parametrize(
    "values",
    [{"steps": 41}, {"steps": 0}, {"height": 65}, {"tiling": "z"}, {"promt": "a"}, {"seed": -2}, {"soft": 1}],
)
def test_what_the_schema_forbids_is_refused(values: dict) -> None:
    validator = jsonschema_rs.validator_for(request_schema(OPTIONS))
    assert validator.is_valid({"prompt": "a"})
    assert not validator.is_valid({"prompt": "a", **values})
    if values not in ({"steps": 41}, {"height": 65}):  # limits of the service, and the model's multiple
        with pytest.raises(ServiceError):
            read(values)
