import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers_pipelines import outputs, tiny_config, tiny_pipeline
from safetensors import safe_open
from tiny_finetuning import DATA, batch, config, model_and_pipeline, their_loss
from torch import nn

from ldm.errors import InputError
from ldm.pipeline.adapters import changeable
from ldm.training.finetune.lora import LoraTask, chosen_layers, kohya, layers_of_model
from ldm.training.objective import draw_timesteps
from ldm.util import instantiate_from_config
from ldm.weights.lora import LoraFile, merge
from ldm.weights.lora_names import targets


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def lora_task(model: nn.Module, **options: object) -> LoraTask:
    """A task whose LoRA does something: its second matrices are not zero."""
    task = LoraTask(model, config(), DATA, **options)
    generator = torch.Generator().manual_seed(1)
    for name, weight in task.trained().items():
        if name.endswith(".up"):
            with torch.no_grad():
                weight.normal_(std=0.1, generator=generator)
    return task


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_layers_have_the_names_that_diffusers_gives_them(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    model = instantiate_from_config(tiny_config(kind))
    theirs = {
        f"unet.{name}"
        for name, layer in pipeline.unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    ours = layers_of_model(shapes_of(model))
    assert {name for name in ours if name.startswith("unet.")} == theirs
    text = {name for name in ours if not name.startswith("unet.")}
    linear = {
        f"text_encoder.text_model.{name.removeprefix('text_model.')}"
        for name, layer in pipeline.text_encoder.named_modules()
        if ".layers." in name and isinstance(layer, nn.Linear)
    }
    assert linear
    assert linear <= text  # v2 has a layer more, which is never run


def test_presets_and_expressions_choose_layers() -> None:
    shapes = shapes_of(instantiate_from_config(tiny_config("v1")))
    attention = chosen_layers(shapes, "attention", False)
    assert all(name.rpartition(".attn")[2][2:] in ("to_q", "to_k", "to_v", "to_out.0") for name in attention)
    blocks = chosen_layers(shapes, "attention+mlp", False)
    everything = chosen_layers(shapes, "all", False)
    assert attention.keys() < blocks.keys() < everything.keys()
    assert not any(name.startswith("text_encoder") for name in everything)
    assert len(chosen_layers(shapes, "all", True)) > len(everything)
    assert set(chosen_layers(shapes, r"attn2\.to_k$", False)) == {
        n for n in everything if n.endswith("attn2.to_k")
    }


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("atention", ["'atention'", "attention"]),
        ("attn2.to_kk", ["matches none", "to_k"]),
        ("(", ["regular expression"]),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: str, words: list[str]) -> None:
    shapes = shapes_of(instantiate_from_config(tiny_config("v1")))
    with pytest.raises(InputError) as error:
        chosen_layers(shapes, layers, False)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_new_lora_changes_nothing_and_a_trained_one_something(kind: str) -> None:
    model, _ = model_and_pipeline(kind)
    before = outputs(model, kind)
    LoraTask(model, config(), DATA, layers="all", text_encoder=True)
    after = outputs(model, kind)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, _ = model_and_pipeline(kind)
    lora_task(model, layers="all", text_encoder=True)
    changed = outputs(model, kind)
    for name in ("text", "unet"):
        assert (changed[name] - before[name]).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_file_does_in_our_commands_what_the_training_did(kind: str, layout: str, tmp_path: Path) -> None:
    model, _ = model_and_pipeline(kind)
    plain = copy.deepcopy(model)
    task = lora_task(model, layers="all", text_encoder=True, rank=3, alpha=5.0, layout=layout)
    (path,) = task.export(tmp_path)
    file, layers = LoraFile(path), changeable(plain)
    match = file.match(targets({name: shape for name, (_, _, shape) in layers.items()}))
    assert match.total == len(match.layers) == len(task.model.lora.parts)
    for layer, target in match.layers.items():
        module, name, _ = layers[target.name]
        weight = getattr(module, name)
        weight.data = merge(weight, [(file.change(layer), 1.0, target.third)])
    expected, found = outputs(model, kind), outputs(plain, kind)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_file_opens_in_diffusers(kind: str, layout: str, tmp_path: Path) -> None:
    model, pipeline = model_and_pipeline(kind)
    plain = outputs(pipeline, kind)
    task = lora_task(model, layers="attention+mlp", text_encoder=True, rank=3, alpha=5.0, layout=layout)
    pipeline.load_lora_weights(task.export(tmp_path)[0])
    expected, found = outputs(model, kind), outputs(pipeline, kind)
    for name in ("unet", "text"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
        assert (found[name] - plain[name]).abs().max() > 1e-2


def test_the_file_has_kohyas_names_and_says_its_rank(tmp_path: Path) -> None:
    model, _ = model_and_pipeline("v1")
    (path,) = lora_task(model, rank=3, alpha=6.0, text_encoder=True).export(tmp_path)
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        assert file.get_tensor("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha") == 6
    assert metadata["ss_network_dim"], metadata["ss_network_alpha"] == ("3", "6")
    assert "lora_te_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight" in names
    assert kohya("unet.mid_block.attentions.0.proj_in") == "lora_unet_mid_block_attentions_0_proj_in"


def test_of_diffusers_layout_no_program_has_to_read_alpha(tmp_path: Path) -> None:
    """It was in the metadata alone: who does not read these took the rank, and changed too little or much."""
    model, _ = model_and_pipeline("v1")
    task = lora_task(model, layers="all", text_encoder=True, rank=3, alpha=6.0, layout="diffusers")
    (path,) = task.export(tmp_path)
    parts = {name: part for part, name in task.model.lora.names.items()}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
        for name in (name for name in file.keys() if name.endswith("lora_B.weight")):  # noqa: SIM118
            up = task.model.lora.parts[parts[name.removesuffix(".lora_B.weight")]].up
            torch.testing.assert_close(file.get_tensor(name), 2 * up.detach())
    assert (facts["unet.r"], facts["unet.lora_alpha"], facts["text_encoder.lora_alpha"]) == (3, 3, 3)


@pytest.mark.parametrize("kind", ["v1", "v2-v"])
def test_a_step_is_that_of_peft(kind: str) -> None:
    """Loss and updated matrices after one step of AdamW, on equal weights, latents and noise."""
    from peft import LoraConfig

    model, pipeline = model_and_pipeline(kind)
    task = lora_task(model, layers="attention", rank=3, alpha=5.0)
    parts = {model.lora.names[name]: part for name, part in model.lora.parts.items()}
    modules = [name.removeprefix("unet.") for name in parts]
    pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=modules))
    theirs = {}
    for name, part in parts.items():
        layer = pipeline.unet.get_submodule(name.removeprefix("unet."))
        for side, own in (("A", part.down), ("B", part.up)):
            weight = getattr(layer, f"lora_{side}")["default"].weight
            weight.data.copy_(own.detach())
            theirs[name, side] = weight, own
    x = batch()
    x0, noise = task.latents(x), task.noise(x, (4, 8, 8))
    t = draw_timesteps(task.config, x["step"], x["row"])
    expected = their_loss(pipeline, x0, noise, t, task.embed(x["caption"]).detach())
    found = task.training_step(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for loss, weights in (
        (found, [w for _, w in theirs.values()]),
        (expected, [w for w, _ in theirs.values()]),
    ):
        loss.backward()
        torch.optim.AdamW(weights, lr=1e-3, eps=1e-4).step()  # an epsilon that rounding is small beside
    assert len(theirs) == 2 * len(parts) > 0
    for weight, own in theirs.values():
        assert weight.grad.abs().max() > 0
        torch.testing.assert_close(own, weight, rtol=1e-5, atol=1e-5)


def test_only_the_lora_is_trained() -> None:
    model, _ = model_and_pipeline("v2")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    task = lora_task(model, layers="all", text_encoder=True)
    assert all(name.startswith("lora.parts.") for name in task.trained())
    task.training_step(batch()).backward()
    assert all(weight.grad is not None for weight in task.trained().values())
    assert all(weight.grad is None for name, weight in model.named_parameters() if name in before)
    assert all(
        torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before
    )


@pytest.mark.parametrize(("rank", "alpha", "word"), [(0, 1.0, "--rank 0"), (4, 0.0, "--alpha 0")])
def test_ranks_that_cannot_be(rank: int, alpha: float, word: str) -> None:
    model, _ = model_and_pipeline("v1")
    with pytest.raises(InputError, match=word):
        LoraTask(model, config(), DATA, rank=rank, alpha=alpha)


def test_a_text_encoder_that_would_have_no_layer_is_refused() -> None:
    """Only the UNet was trained, in spite of --text_encoder."""
    shapes = shapes_of(instantiate_from_config(tiny_config("v1")))
    with pytest.raises(
        InputError, match=r"--text_encoder: --layers .* no layer of the text encoder, such as"
    ):
        chosen_layers(shapes, r"attn2\.to_[kv]$", True)
    assert chosen_layers(shapes, r"attn2\.to_[kv]$|k_proj$", True)


def test_a_layer_that_is_never_run_is_none_to_choose() -> None:
    """Of v2's last layer of the text encoder no weight was left to train: a ValueError of the optimiser."""
    model, _ = model_and_pipeline("v2")
    last = len(model.cond_stage_model.model.transformer.resblocks) - 1
    with pytest.raises(InputError, match="matches none of the model's"):
        LoraTask(model, config(), DATA, layers=rf"encoder\.layers\.{last}\.", text_encoder=True)
