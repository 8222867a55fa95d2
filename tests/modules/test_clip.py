"""The text transformer against transformers' own."""

import pytest
import torch

from ldm.errors import InputError
from ldm.modules.encoders.clip import CLIPTextTransformer


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_same_function_as_transformers(activation):
    """transformers 5.6 dropped `text_model.` from its keys; either spelling will do."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "max_position_embeddings": 20, "hidden_size": 32, "intermediate_size": 128}
    config = CLIPTextConfig(num_hidden_layers=3, num_attention_heads=4, hidden_act=activation, **sizes)
    theirs = CLIPTextModel(config).eval()
    ours = CLIPTextTransformer(
        width=32, layers=3, heads=4, vocab_size=100, context_length=20, activation=activation
    )
    state = {
        name.removeprefix("text_model."): torch.randn_like(tensor) * 0.2
        for name, tensor in theirs.state_dict().items()
        if "position_ids" not in name
    }
    ours.load_state_dict(state)
    getattr(theirs, "text_model", theirs).load_state_dict(state, strict=False)
    ids = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match=r"'relu' .* quick_gelu, gelu"):
        CLIPTextTransformer(activation="relu")
