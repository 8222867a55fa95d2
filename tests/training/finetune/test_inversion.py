"""Textual inversion: diffusers' step on equal weights, what stays frozen, the files, and mistakes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_pipelines import tiny_config, tiny_pipeline
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import BERTEmbedder, Tokens
from ldm.pipeline.prompts import PromptReader
from ldm.pipeline.settings.text import Reading
from ldm.training.config import TrainingConfig
from ldm.training.finetune.inversion import (
    TEMPLATES,
    InversionTask,
    check_captions,
    check_room,
    new_word,
    token_embedding,
    write_embedding,
)
from ldm.training.objective import draw_timesteps
from ldm.training.start import start_latent_diffusion
from ldm.weights.embedding import read_embedding

WORD, INIT = "<dice>", "cube"
CAPTIONS = ["a photo of a <dice> on a table", "<dice>"]
STEP = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusion]:
    """Our models with the weights of diffusers' tiny ones; tests copy them."""
    found = {}
    for kind in ("v1", "v2-v"):
        folder = tmp_path_factory.mktemp(kind)
        tiny_pipeline(kind).save_pretrained(folder)
        found[kind] = start_latent_diffusion(tiny_config(kind), settings(init=str(folder)))
    return found


def settings(**values: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 1, "batch_size": 2, "learning_rate": 1e-2} | values)


def batch() -> dict[str, Any]:
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"step": 0, "row": torch.arange(2), "caption": list(CAPTIONS), "image": image}


def their_step(kind: str, task: InversionTask, count: int) -> tuple[Tensor, Tensor]:
    """The loss of diffusers' textual_inversion.py on the task's batch, and its new rows after one step."""
    pipeline = tiny_pipeline(kind)
    text, tokenizer = copy.deepcopy(pipeline.text_encoder), copy.deepcopy(pipeline.tokenizer)
    names = [WORD, *(f"{WORD}_{k}" for k in range(1, count))]
    tokenizer.add_tokens(names)
    text.resize_token_embeddings(len(tokenizer))
    weight = text.get_input_embeddings().weight
    rows = tokenizer.convert_tokens_to_ids(names)
    (init,) = tokenizer.encode(INIT, add_special_tokens=False)
    weight.data[rows] = weight.data[init].clone()
    weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], **STEP)

    given = batch()
    captions = [each.replace(WORD, " ".join(names)) for each in CAPTIONS]
    ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    dist = pipeline.vae.encode(given["image"]).latent_dist
    posterior = task.normal(given, dist.mean.shape[1:], "posterior")
    latents = (dist.mean + dist.std * posterior) * pipeline.vae.config.scaling_factor
    noise = task.noise(given, latents.shape[1:])
    t = draw_timesteps(task.config, 0, given["row"])
    noisy = pipeline.scheduler.add_noise(latents, noise, t)
    predicted = pipeline.unet(noisy, t, text(ids)[0]).sample
    is_v = pipeline.scheduler.config.prediction_type == "v_prediction"
    target = pipeline.scheduler.get_velocity(latents, noise, t) if is_v else noise
    loss = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
    loss.backward()
    optimizer.step()
    return loss.detach(), weight.data[rows]


@pytest.mark.parametrize(("kind", "count"), [("v1", 1), ("v1", 3), ("v2-v", 2)])
def test_a_step_is_that_of_diffusers_and_changes_nothing_else(
    models: dict[str, LatentDiffusion], kind: str, count: int
) -> None:
    ours = copy.deepcopy(models[kind])
    word = new_word(ours.cond_stage_model, WORD, INIT, count)
    task = InversionTask(ours, settings(), new=word)
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    assert torch.equal(before["new_word.vectors"][0], before["new_word.vectors"][-1])

    (trained,) = task.trained().values()
    optimizer = torch.optim.AdamW([trained], **STEP)
    loss = task.training_step(batch())
    loss.backward()
    optimizer.step()

    their_loss, their_rows = their_step(kind, task, count)
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert (trained - before["new_word.vectors"]).abs().min() > 1e-3, "every number was learned"
    torch.testing.assert_close(trained.detach(), their_rows, rtol=0, atol=1e-5)
    after = ours.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["new_word.vectors"]


def test_files_are_read_here_and_by_diffusers(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    import diffusers

    ours = copy.deepcopy(models["v1"])
    word = new_word(ours.cond_stage_model, WORD, INIT, 2)
    word.vectors.data.normal_(generator=torch.Generator().manual_seed(2))
    task = InversionTask(ours, settings(), new=word)
    files = task.export(tmp_path)
    assert [file.name for file in files] == ["dice.safetensors", "dice.pt"]
    for file in files:
        read = read_embedding(file)
        assert "dice" in read.names
        assert torch.equal(read.vectors, word.vectors.detach())
    a1111 = torch.load(files[1], weights_only=True)
    assert a1111["name"] == "dice"
    assert torch.equal(a1111["string_to_param"]["*"], word.vectors.detach())

    with torch.no_grad():
        learned = task.embed(CAPTIONS[:1])
        reader = PromptReader(lambda: ours.cond_stage_model)
        reading = Reading(embedding=(str(files[0]),))
        sampled = reader.embed(ours.cond_stage_model.encode, CAPTIONS[0], reading)
    assert torch.equal(learned, sampled), "a prompt is read as its caption was in training"

    parts = tiny_pipeline("v1").components
    copied = {name: copy.deepcopy(parts[name]) for name in ("text_encoder", "tokenizer")}
    pipeline = diffusers.StableDiffusionPipeline(**parts | copied, requires_safety_checker=False)
    pipeline.load_textual_inversion(str(files[0]))
    theirs, _ = pipeline.encode_prompt(CAPTIONS[0], "cpu", 1, False)
    torch.testing.assert_close(theirs, learned, rtol=0, atol=1e-5)


def test_all_captions_are_read(models: dict[str, LatentDiffusion]) -> None:
    ours = copy.deepcopy(models["v1"])
    task = InversionTask(ours, settings(prompt_dropout=1.0), new=new_word(ours.cond_stage_model, WORD, INIT))
    assert task.captions(batch()) == CAPTIONS
    tokens = task.reader.tokens(CAPTIONS)
    assert isinstance(tokens, Tokens)
    assert [(row, at) for row, at, _ in tokens.vectors] == [(0, 5), (1, 1)]
    assert all(v is ours.new_word.vectors for _, _, v in tokens.vectors)
    empty = [task.captions(batch() | {"step": step, "caption": ["", " "]}) for step in range(8)]
    drawn = {text for texts in empty for text in texts}
    assert drawn <= {text.format(WORD) for text in TEMPLATES}
    assert len(drawn) > 2


def test_captions_name_the_word() -> None:
    check_captions(WORD, ["a <DICE>", " "])
    with pytest.raises(InputError, match="the caption 'a red cube' does not name <dice>"):
        check_captions(WORD, ["<dice>", "a red cube"])


def test_another_word_with_the_new_one_in_it_is_another() -> None:
    """Captions with "zqxs" passed, and taught the word "zqx" nothing."""
    check_captions("zqx", ["ZQX, in the rain", "two (zqx:1.2)"])
    for caption in ("two zqxs", "a bezqx"):
        with pytest.raises(InputError, match="does not name zqx"):
            check_captions("zqx", [caption])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("dog", "cube"), "--token dog: the model has this word already"),
        (("a dog", "cube"), "--token 'a dog' is not one word"),
        (("<>", "cube"), "--token '<>' is not one word"),
        ((WORD, "photorealistically"), "--init_word 'photorealistically' is 3 tokens ('photo', "),
        ((WORD, " "), "--init_word ' ' is no token"),
    ],
)
def test_words_that_cannot_be(
    models: dict[str, LatentDiffusion], arguments: tuple[str, str], why: str
) -> None:
    encoder = copy.deepcopy(models["v1"]).cond_stage_model
    with pytest.raises(InputError) as error:
        new_word(encoder, *arguments)
    assert str(error.value).startswith(why)
    assert "\n" not in str(error.value)


def test_another_text_encoder() -> None:
    with torch.device("meta"):
        encoder = BERTEmbedder(8, 1)
    with pytest.raises(InputError, match="this model's is a BERTEmbedder"):
        new_word(encoder, WORD, INIT)


def test_a_new_word_begins_as_another(models: dict[str, LatentDiffusion]) -> None:
    encoder = models["v2-v"].cond_stage_model
    (row,) = encoder.tokenizer.encode(INIT)
    word = new_word(encoder, WORD, INIT, 2)
    assert torch.equal(word.vectors[1], token_embedding(encoder).weight[row])


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_embedding(WORD, torch.zeros(1, 8), tmp_path / "file")


def test_the_word_has_room_in_every_caption(models: dict[str, LatentDiffusion]) -> None:
    """Behind the last token it taught nothing, or the step ended in a RuntimeError without a gradient."""
    encoder = models["v1"].cond_stage_model
    early, late = f"{WORD} " + "cube " * 80, "cube " * 73 + WORD
    check_room(encoder, WORD, 1, [early, late, "", f"{WORD} {late} {WORD}"])
    check_room(encoder, WORD, 2, [late])
    with pytest.raises(InputError, match=r"names <dice> too late: its 3 tokens .* fit into the 75 that"):
        check_room(encoder, WORD, 3, [early, late])


def test_validation_and_samples_name_the_word(
    models: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images without captions they were those of the empty prompt, which the word changes nothing of."""
    ours = copy.deepcopy(models["v1"])
    task = InversionTask(
        ours, settings(sample_steps=1, sample_scale=1.0), new=new_word(ours.cond_stage_model, WORD, INIT)
    )
    asked: list[list[str]] = []
    embed = task.embed
    monkeypatch.setattr(task, "embed", lambda captions: asked.append(captions) or embed(captions))
    given = batch() | {"step": -1, "caption": ["", "the <dice>"]}
    task.validation_losses(given)
    task.sample_grid(given)
    for captions in asked[:2]:
        assert captions[0] in {template.format(WORD) for template in TEMPLATES}
        assert captions[1] == "the <dice>"
    assert asked[0] == asked[1]
