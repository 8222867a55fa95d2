import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.errors import InputError
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.service import models as models_module
from ldm.service.errors import BadRequest, UnknownModel
from ldm.service.models import Models, NamedModel, bundled_models, parse_model
from ldm.weights.loading import BUNDLED_WEIGHTS, find


def models(model: tuple[Path, Path], *names: str, **choices: object) -> Models:
    config, weights = model
    named = [f"{name}={weights},{config}" for name in names or ("one", "two", "three")]
    return Models(named, RuntimeOptions(device="cpu"), safety="off", **choices)


def test_a_model_is_named_on_the_command_line() -> None:
    assert parse_model("a=b.ckpt") == NamedModel("a", "b.ckpt", None)
    assert parse_model("a =b.ckpt,c.yaml") == NamedModel("a", "b.ckpt", "c.yaml")
    assert parse_model("a=x=y.ckpt") == NamedModel("a", "x=y.ckpt", None)


@pytest.mark.parametrize("text", ["", "a", "=b.ckpt", "a=", "a=b.ckpt,", "a=,c.yaml", " =b", "a\nb=c.ckpt"])
def test_what_names_no_model_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="--model"):
        parse_model(text)


def test_without_names_there_is_one_model_under_its_own() -> None:
    found = Models(runtime=RuntimeOptions(device="cpu"), safety="off")
    linked = found.reader(found.default).files.weights.resolve() != find(BUNDLED_WEIGHTS).resolve()
    if linked:
        pytest.skip("weights are linked here")
    assert found.names == ("scenes-128",)
    assert found.task("scenes-128") == "text"


def test_the_bundled_models_have_names() -> None:
    found = {one.name: one for one in bundled_models()}
    assert {"scenes-128", "scenes-128-inpainting", "scenes-64-v", "scenes-64-depth", "scenes-x4"} <= {*found}
    opened = Models([found["scenes-64-depth"]], RuntimeOptions(device="cpu"), safety="off")
    assert opened.task("scenes-64-depth") == "depth"


def test_names_are_given_once(model: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="two models have this name"):
        models(model, "a", "a")


def test_a_file_that_is_not_there_is_an_error_at_once(model: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.ckpt"):
        Models([f"a={tmp_path / 'nothing.ckpt'},{model[0]}"], safety="off")


def test_an_unknown_model_is_answered_with_the_choices(model: tuple[Path, Path]) -> None:
    with pytest.raises(UnknownModel, match="'four'; choose from one, two, three"):
        models(model).resolve("four", ImageRequest("a cube"))


def test_weights_are_loaded_once_and_the_oldest_make_room(model: tuple[Path, Path]) -> None:
    found = models(model, loaded=2)
    assert found.loaded == ()
    one = found.pipeline("one")
    weights = weakref.ref(one.model)
    assert found.pipeline("one") is one
    found.pipeline("two")
    found.pipeline("one")
    two = weakref.ref(found.pipeline("two").model)
    found.pipeline("one")
    found.pipeline("three")
    assert found.loaded == ("one", "three")
    assert (found.loads, found.evictions) == (3, 1)
    assert [found.needs_room(name) for name in found.names] == [False, True, False]
    assert two() is None
    assert weights() is not None
    del one
    found.close()
    assert found.loaded == ()
    assert weights() is None


def test_models_that_make_room_do_not_add_up(model: tuple[Path, Path]) -> None:
    found = models(model, loaded=1)
    weights = [weakref.ref(found.pipeline(name).model) for name in [*found.names, *found.names]]
    assert found.evictions == 5
    assert [ref() is not None for ref in weights] == [False] * 5 + [True]


def test_it_is_measured_how_long_loading_takes(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, clock = models(model, loaded=1), iter([10.0, 13.0, 20.0, 20.5, 22.0, 30.0, 30.5, 35.0])
    monkeypatch.setattr(models_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert found.seconds_to_load("one") == 0
    assert not found.needs_room("one")
    for name in ("one", "one", "two", "one"):
        found.pipeline(name)
    monkeypatch.undo()
    assert [found.seconds_to_load(name) for name in found.names] == [5, 2, 5]  # "three" is not known yet
    assert (found.load_seconds, found.loaded_at) == (10, 35)
    assert [found.evicted(name) for name in found.names] == [20.5, 30.5, float("-inf")]


def test_requests_are_resolved_without_weights_while_the_model_is_in_use(model: tuple[Path, Path]) -> None:
    found, resolved = models(model), []
    pipeline = found.pipeline("one")

    def resolve() -> None:
        resolved.append(found.resolve("one", ImageRequest("a cube", hires=2.0)))

    thread = threading.Thread(target=resolve)
    for _ in pipeline.generate([ImageRequest("a cube", steps=1)]):
        thread.start()
        thread.join()
    request, size = resolved[0]
    assert (request.height, request.width, request.scale) == (16, 16, 7.5)
    assert size == (32, 32)
    assert "model" not in vars(found.reader("one"))


def test_a_plain_name_is_looked_for_in_its_folder_alone(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the working folder were taken, and the answer showed whether there are any."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    for name in ("tok", "loras/Known.safetensors", "Known"):
        (tmp_path / name).write_bytes(b"")
    found = models(model, "one", lora_folder=str(tmp_path / "loras"))
    adapters = found.reader("one").adapters
    assert adapters.find("known") == adapters.find("Known") == tmp_path / "loras/Known.safetensors"
    for name in ("tok", "nok"):
        tagged = ImageRequest(f"a <lora:{name}:1>", prompt_syntax="a1111")
        with pytest.raises(BadRequest) as caught:
            found.resolve("one", tagged)
        assert caught.value.message == f'lora: there is no "{name}"; this service has Known'
    assert type(found.pipeline("one").adapters) is type(adapters)
    found.close()


def test_what_only_the_weights_could_say_is_an_error(model: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="does not say enough about its model"):
        models(model).reader("one").model  # noqa: B018


def test_a_lora_may_lie_beside_the_folder_which_goes_first(model: tuple[Path, Path], tmp_path: Path) -> None:
    """With a folder of one's own a bundled LoRA could not be named in a prompt."""
    folder, beside = tmp_path / "own", tmp_path / "bundled"
    for place, names in ((folder, ("ink",)), (beside, ("ink", "Few-Steps"))):
        place.mkdir()
        for name in names:
            (place / f"{name}.safetensors").touch()
    given = sorted(beside.iterdir())
    found = models(model, "one", lora_folder=str(folder), loras=given).reader("one").adapters
    assert found.find("Ink") == folder / "ink.safetensors"
    for name in ("few-steps", "Few-Steps.safetensors"):
        assert found.find(name) == beside / "Few-Steps.safetensors"
    with pytest.raises(BadRequest, match=r'lora: there is no "oil"; this service has ink, Few-Steps$'):
        found.find("oil")
    alone = models(model, "one", lora_folder=str(folder)).reader("one").adapters
    with pytest.raises(BadRequest, match=r"this service has ink$"):
        alone.find("few-steps")
