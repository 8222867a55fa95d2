import pytest

from ldm.errors import InputError
from ldm.prompts.lora_tags import split_lora_tags


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a cube", "a cube", ()),
        ("a <b> cube", "a <b> cube", ()),
        ("a <lora:x> cube", "a cube", (("x", 1.0, 1.0),)),
        ("<lora:x:0.8>a cube", "a cube", (("x", 0.8, 0.8),)),
        ("a cube <lora:x y.v2:0.5:0.8>", "a cube", (("x y.v2", 0.8, 0.5),)),
        ("a <lora:x:te=0.5:unet=-1><LoRA:y:unet=0.2>", "a", (("x", -1.0, 0.5), ("y", 0.2, 1.0))),
        ("a <lyco:x:0.3> (b:1.2)", "a (b:1.2)", (("x", 0.3, 0.3),)),
        ("a <hypernet:x:1>", "a <hypernet:x:1>", ()),
    ],
)
def test_tags(prompt: str, text: str, tags: tuple) -> None:
    assert split_lora_tags(prompt) == (text, tags)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora::0.8>", "names no LoRA"),
        ("<lora:x:strong>", "the weight 'strong' is not a number"),
        ("<lora:x:inf>", "the weight 'inf' is not a number"),
        ("<lora:x:1:1:8>", "'8' is neither te=NUMBER nor unet=NUMBER"),
        ("<lora:x:dyn=8>", "'dyn=8' is neither"),
    ],
)
def test_malformed_tags(prompt: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        split_lora_tags(f"a cube {prompt}")
