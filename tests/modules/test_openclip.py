"""OpenCLIP's text transformer against open_clip's own blocks."""

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.encoders.openclip import OpenCLIPTextTransformer

SIZES = {"width": 32, "layers": 3, "heads": 4, "vocab_size": 100, "context_length": 20}


@pytest.mark.parametrize(("layer", "read"), [("last", 3), ("penultimate", 2)])
def test_same_function_as_open_clip(layer, read):
    from open_clip.transformer import TextTransformer

    theirs = TextTransformer(output_dim=32, **SIZES).eval()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.2
        for name, value in theirs.state_dict().items()
        if name != "attn_mask"
    }
    theirs.load_state_dict(state, strict=False)
    ours = OpenCLIPTextTransformer(**SIZES, layer=layer)
    ours.load_state_dict(state | {"logit_scale": torch.tensor(1.0)})
    ids = torch.randint(0, 99, (2, 20), generator=generator)
    with torch.no_grad():
        x = theirs.token_embedding(ids) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[:read]:
            x = block(x, attn_mask=theirs.attn_mask)
        torch.testing.assert_close(ours(ids), theirs.ln_final(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_what_is_unused_changes_nothing(layer):
    model = OpenCLIPTextTransformer(**SIZES, layer=layer).requires_grad_(False)
    ids = torch.arange(20)[None]
    before = model(ids)
    unused = set(model.unused_weights)
    assert {"text_projection", "logit_scale"} <= unused
    assert any(name.startswith("transformer.resblocks.2.") for name in unused) == (layer == "penultimate")
    for name, weight in model.named_parameters():
        if name in unused:
            weight += 1.0
    assert torch.equal(model(ids), before)
    for name, weight in model.named_parameters():
        if name not in unused and "token_embedding" not in name:
            weight += torch.linspace(0, 1, weight.shape[-1])
            assert not torch.equal(model(ids), before), name
            weight -= torch.linspace(0, 1, weight.shape[-1])


def test_params_that_cannot_be():
    with pytest.raises(InputError, match=r"'hidden' .* last, penultimate"):
        OpenCLIPTextTransformer(layer="hidden")
    with pytest.raises(InputError, match=r"100 .* 12"):
        OpenCLIPTextTransformer(width=100, heads=12)
