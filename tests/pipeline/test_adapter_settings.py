import pytest

from ldm.errors import FieldError
from ldm.pipeline.infotext import a1111_parameters, parse_a1111
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.adapters import parse_lora


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("x.safetensors", ("x.safetensors", 1.0, 1.0)),
        ("x.safetensors:0.8", ("x.safetensors", 0.8, 0.8)),
        ("a/x.PT:0.8:-0.5", ("a/x.PT", 0.8, -0.5)),
        ("C:\\loras\\x.safetensors:0.8", ("C:\\loras\\x.safetensors", 0.8, 0.8)),
        ("run 12:30/x.safetensors:0.8", ("run 12:30/x.safetensors", 0.8, 0.8)),
        ("run 12:30/x:0.8", ("run 12:30/x", 0.8, 0.8)),
        ("a.pt:1.safetensors", ("a.pt:1.safetensors", 1.0, 1.0)),
        ("name:0.8", ("name", 0.8, 0.8)),
        ("name v1.5", ("name v1.5", 1.0, 1.0)),
        ("D:/name", ("D:/name", 1.0, 1.0)),
    ],
)
def test_files_and_weights(text: str, parsed: tuple) -> None:
    assert parse_lora(text) == parsed
    assert ImageRequest(lora=text).loras == (parsed,)


@pytest.mark.parametrize("text", ["x.safetensors:", "x:a", "x.pt:1:2:3", ":1", "", "x:1e3"])
def test_malformed_ones(text: str) -> None:
    with pytest.raises(FieldError, match=r"^lora: "):
        ImageRequest(lora=(text,))


def test_only_images_with_loras_have_the_setting() -> None:
    assert "lora" not in ImageRequest().settings()
    assert ImageRequest(lora="x:0.5").settings()["lora"] == ("x:0.5",)


@pytest.mark.parametrize("name", ["lora", "embedding"])
def test_none_is_none(name: str) -> None:
    """An embedding had no such word: "no textual inversion at none"."""
    assert getattr(ImageRequest(**{name: "none"}), name) == ()
    assert name not in ImageRequest(**{name: ["none"]}).settings()
    both = ("none", "a.pt")
    assert getattr(ImageRequest(**{name: both}), name) == both  # a file may have that name


def test_tags_for_other_tools_and_back() -> None:
    settings = {"prompt": "a cube", "width": 64, "height": 64, "sampler": "ddim", "steps": 5}
    loras = ["dir/x.v1.safetensors:0.8:0.5", "y"]
    text = a1111_parameters(settings | {"lora": loras})
    assert text.startswith("a cube <lora:x.v1:0.5:0.8> <lora:y:1:1>\nSteps: 5")
    read = parse_a1111(text)
    assert (read["prompt"], read["lora"]) == ("a cube", ("x.v1:0.8:0.5", "y:1:1"))
    assert ImageRequest(lora=read["lora"]).loras == (("x.v1", 0.8, 0.5), ("y", 1.0, 1.0))
    assert "lora" not in parse_a1111("a cube <lora:x:strong>\nSteps: 5")
