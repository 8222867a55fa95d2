from pathlib import Path

import pytest

from ldm.errors import InputError
from ldm.pipeline.request import ImageRequest
from ldm.webui.files import Files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    for folder, names in {
        "loras": ("Ink.safetensors", "wash.pt", "notes.txt"),
        "words": ("toy.pt", "toy.json"),
        "nets": ("edges.pth",),
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    monkeypatch.chdir(tmp_path)
    return Files.found("loras", "words", "nets")


def test_files_are_offered_by_name(files: Files) -> None:
    assert {name: files.loras[name] for name in ("Ink.safetensors", "wash.pt")} == {
        "Ink.safetensors": "loras/Ink.safetensors",
        "wash.pt": "loras/wash.pt",
    }
    assert files.embeddings == {"toy.pt": "words/toy.pt"}
    assert files.controls["edges.pth"] == "nets/edges.pth"


def test_what_came_with_the_repository_is_offered_beside_them(files: Files) -> None:
    """A folder of one's own hid the bundled LoRA, and of the two ControlNets there was only one."""
    assert files.loras["few-steps.safetensors"].endswith("models/loras/few-steps.safetensors")
    for name in ("scenes-128-canny", "scenes-64-canny"):
        assert files.controls[name].endswith(f"models/{name}/model.safetensors")
    assert {files.loras["wash.pt"], files.embeddings["toy.pt"], files.controls["edges.pth"]} < {*files.paths}


def test_weights_are_for_all_or_for_each(files: Files) -> None:
    both = ["wash.pt", "Ink.safetensors"]
    assert files.lora_texts(both, "0.5") == ("loras/wash.pt:0.5", "loras/Ink.safetensors:0.5")
    assert files.lora_texts(both, "1, 0.8:0.2") == ("loras/wash.pt:1", "loras/Ink.safetensors:0.8:0.2")
    assert files.lora_texts(both[:1], "") == ("loras/wash.pt:1",)
    assert files.lora_texts([], "1,2,3") == ()
    with pytest.raises(InputError, match="3 for 2 LoRAs"):
        files.lora_texts(both, "1,2,3")


@pytest.mark.parametrize("name", ["/etc/passwd", "../nets/edges.pth", "loras/wash.pt", "notes.txt", ""])
def test_nothing_else_can_be_named(files: Files, name: str) -> None:
    with pytest.raises(InputError, match="there are"):
        files.lora_texts([name], "1")
    with pytest.raises(InputError):
        files.embedding_texts([name])
    with pytest.raises(InputError):
        files.control(name, None, 1.0, 0.0, 1.0)


def test_neither_can_a_prompt_name_it(files: Files) -> None:
    files.check(ImageRequest("a <lora:ink:1> <lora:wash:0.5>", prompt_syntax="a1111"))
    files.check(ImageRequest("a <lora:/etc/passwd:1>"))  # which is text in the plain syntax
    for path in ("/etc/passwd", "nets/edges.pth", "../loras/wash.pt"):
        with pytest.raises(InputError, match="no LoRA"):
            files.check(ImageRequest(f"a <lora:{path}:1>", prompt_syntax="a1111"))


def test_loras_in_folders_below(files: Files, tmp_path: Path) -> None:
    """The page offered none of them, and refused prompts that name them, which the commands find."""
    (tmp_path / "loras/styles").mkdir()
    (tmp_path / "loras/styles/Oil.safetensors").touch()
    with pytest.raises(InputError, match="no LoRA 'oil'"):
        files.check(ImageRequest("a <lora:oil:1>", prompt_syntax="a1111"))
    found = Files.found("loras", "words", "nets")
    assert found.loras["styles/Oil.safetensors"] == "loras/styles/Oil.safetensors"
    assert found.lora_texts(["styles/Oil.safetensors"], "0.5") == ("loras/styles/Oil.safetensors:0.5",)
    for name in ("oil", "OIL.safetensors", "styles/oil", "styles/Oil.safetensors"):
        found.check(ImageRequest(f"a <lora:{name}:1>", prompt_syntax="a1111"))


def test_a_folder_that_is_given_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^lora_folder .*missing is no folder$"):
        Files.found(lora_folder=str(tmp_path / "missing"))
