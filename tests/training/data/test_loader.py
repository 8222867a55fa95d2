"""Batches that depend on the seed and the step alone: not on workers, processes or where a run began."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import encoded, image, in_memory, write_folder
from tiny_training import TRAINING

from ldm.errors import InputError
from ldm.training.config import TrainingConfig, training_config
from ldm.training.data.config import DataConfig
from ldm.training.data.example import Example, InMemory, Source
from ldm.training.data.folder import ImageFolder
from ldm.training.data.loader import Batch, Pixels, loader, validation_batches
from ldm.training.data.sources import filtered

Rows = dict[int, tuple[str, torch.Tensor]]  # caption and pixels of the rows of a global batch

NONE = {"target": "nothing"}
SIZES = [(64, 64), (128, 32), (40, 100), (90, 30), (64, 60)] * 5  # of 25 images, for several buckets
BUCKETS = DataConfig(train=NONE, size=64, buckets=True, bucket_step=16, crop="random", flip=0.5, workers=0)
SQUARES = replace(BUCKETS, buckets=False)
BOTH = pytest.mark.parametrize("data", [SQUARES, BUCKETS], ids=["squares", "buckets"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(steps: int = 12, batch_size: int = 6, **more: Any) -> TrainingConfig:
    return training_config(TRAINING | {"steps": steps, "batch_size": batch_size, "seed": 3} | more)


def global_batches(
    data: DataConfig,
    source: Source,
    settings: TrainingConfig,
    world: int = 1,
    device_batch: int | None = None,
) -> dict[int, Rows]:
    """The batches of all steps, gathered from all processes."""
    found: dict[int, Rows] = {}
    for rank in range(world):
        for batch in loader(data, source, settings, rank, world, device_batch):
            for k, row in enumerate(batch["row"].tolist()):
                rows = found.setdefault(batch["step"], {})
                assert row not in rows, "every row belongs to one process"
                rows[row] = batch["caption"][k], batch["image"][k]
    return found


def assert_equal(one: dict[int, Rows], other: dict[int, Rows]) -> None:
    assert one.keys() == other.keys()
    for step, rows in one.items():
        assert rows.keys() == other[step].keys()
        for row, (caption, pixels) in rows.items():
            assert caption == other[step][row][0]
            assert torch.equal(pixels, other[step][row][1])


def shown(x: torch.Tensor) -> np.ndarray:
    """An image of a batch in 256 levels, [h, w, 3]."""
    return (127.5 * (x + 1)).round().numpy().transpose(1, 2, 0)


@BOTH
@pytest.mark.parametrize(
    ("world", "device_batch", "workers"),
    [(2, None, 0), (3, None, 0), (1, 2, 0), (3, 1, 0), (2, 3, 2)],
    ids=str,
)
def test_processes_workers_and_accumulation_change_no_batch(
    data: DataConfig, world: int, device_batch: int | None, workers: int
) -> None:
    source = in_memory(SIZES)
    plain = global_batches(data, source, config())
    assert all(rows.keys() == set(range(6)) for rows in plain.values())
    assert_equal(global_batches(replace(data, workers=workers), source, config(), world, device_batch), plain)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (3, 1)])
def test_bucketed_filtered_and_shuffled_every_sample_comes_once_an_epoch(world: int, workers: int) -> None:
    """After batch_size epochs every bucket's last batch is full, and every sample was seen so many times."""
    source = in_memory(SIZES, aesthetic=[k % 4 for k in range(25)])
    kept = filtered(source, {"aesthetic": ">= 1"})
    data = replace(BUCKETS, workers=workers)
    lengths = [len(group) for group in Pixels(data, kept).groups]
    assert len(lengths) >= 4
    rows = global_batches(data, kept, config(sum(lengths)), world).values()
    seen = Counter(caption for step in rows for caption, _ in step.values())
    assert seen == {kept.caption(k): 6 for k in range(len(kept))}
    assert not any(f"image {k}" in seen for k in range(0, 25, 4)), "what was filtered out is never seen"
    for step in rows:
        assert len({tuple(pixels.shape) for _, pixels in step.values()}) == 1, "a batch has one size"


def test_without_buckets_each_epoch_is_a_permutation() -> None:
    source = in_memory([(8, 8)] * 10)
    found = global_batches(replace(SQUARES, size=8), source, config(steps=15, batch_size=4))
    captions = [found[step][row][0] for step in range(15) for row in range(4)]
    epochs = [captions[start : start + 10] for start in range(0, 60, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6


@BOTH
@pytest.mark.parametrize("first_step", [1, 5, 11, 12])
def test_a_resumed_run_has_the_same_rest(data: DataConfig, first_step: int) -> None:
    source = in_memory(SIZES)
    whole = list(loader(data, source, config(), device_batch=3))
    rest = loader(data, source, config(), device_batch=3, first_step=first_step)
    assert len(rest) == 2 * (12 - first_step)
    for got, expected in zip(rest, whole[2 * first_step :], strict=True):
        assert (got["step"], got["caption"]) == (expected["step"], expected["caption"])
        assert torch.equal(got["row"], expected["row"])
        assert torch.equal(got["image"], expected["image"])


def test_nothing_before_the_first_step_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_memory([(8, 8)] * 10)
    read: list[int] = []
    plain = InMemory.__getitem__
    monkeypatch.setattr(InMemory, "__getitem__", lambda self, k: read.append(k) or plain(self, k))
    list(loader(replace(SQUARES, size=8), source, config(steps=1000, batch_size=4), first_step=998))
    assert len(read) == 8


def test_another_seed_is_another_order_with_other_crops() -> None:
    source = in_memory([(64, 32)] * 6)
    data = replace(SQUARES, size=32, flip=0.0)
    one, two = (global_batches(data, source, config(steps=1, seed=seed))[0] for seed in (1, 2))
    assert [one[row][0] for row in range(6)] != [two[row][0] for row in range(6)]
    pixels = [dict(rows.values()) for rows in (one, two)]
    assert not any(torch.equal(pixels[0][caption], pixels[1][caption]) for caption in pixels[0])


def test_flips_and_crops_are_off_unless_asked_for() -> None:
    source = in_memory([(16, 16)] * 4)
    for step in loader(DataConfig(train=NONE, size=16), source, config(steps=4, batch_size=4)):
        for caption, x in zip(step["caption"], step["image"], strict=True):
            assert np.array_equal(shown(x), source[int(caption.split()[1])].image)


def test_a_half_is_mirrored() -> None:
    source = in_memory([(16, 16)] * 4)
    flips = 0
    for step in loader(replace(SQUARES, size=16), source, config(steps=100, batch_size=4)):
        for caption, x in zip(step["caption"], step["image"], strict=True):
            original = source[int(caption.split()[1])].image
            mirrored = np.array_equal(shown(x), original[:, ::-1])
            assert mirrored or np.array_equal(shown(x), original)
            flips += mirrored
    assert 150 < flips < 250


def test_maps_and_masks_come_along() -> None:
    maps = {
        "depth": np.ones((32, 32), np.float32),
        "control": np.zeros((32, 32, 3), np.uint8),
        "small": np.zeros((8, 8, 3), np.uint8),
    }
    source = InMemory([Example("a", np.zeros((32, 32, 3), np.uint8), "x", maps)])
    (batch,) = loader(replace(SQUARES, size=32, masks=True), source, config(steps=1, batch_size=2))
    shapes = {name: tuple(x.shape) for name, x in batch.items() if isinstance(x, torch.Tensor)}
    assert shapes == {
        "row": (2,),
        "image": (2, 3, 32, 32),
        "mask": (2, 1, 32, 32),
        "depth": (2, 1, 32, 32),
        "control": (2, 3, 32, 32),
        "small": (2, 3, 8, 8),
    }
    assert batch.keys() == {*shapes, "step", "caption"}
    assert set(batch["mask"].unique().tolist()) <= {0.0, 1.0}


def test_drawn_masks_differ_from_row_to_row_and_a_sources_own_stay() -> None:
    data = replace(SQUARES, size=32, masks={"everything": 0.0})
    (batch,) = loader(data, in_memory([(32, 32)]), config(steps=1, batch_size=6))
    assert len({mask.numpy().tobytes() for mask in batch["mask"]}) == 6
    maps = {"mask": np.eye(32, dtype=np.float32)}
    own = InMemory([Example("a", np.zeros((32, 32, 3), np.uint8), "x", maps)])
    (batch,) = loader(replace(data, flip=0.0), own, config(steps=1, batch_size=2))
    assert torch.equal(batch["mask"][0, 0], torch.eye(32))


def test_patches_are_parts_of_the_images() -> None:
    source = in_memory([(32, 32)])
    (batch,) = loader(DataConfig(train=NONE, size=32, patch=8), source, config(steps=1, batch_size=6))
    whole = torch.from_numpy(source[0].image.copy()).permute(2, 0, 1) / 127.5 - 1
    windows = whole.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
    for patch in batch["image"]:
        assert (windows - patch).abs().amax((1, 2, 3)).min() < 1e-6
    assert len({patch.numpy().tobytes() for patch in batch["image"]}) == 6


def test_a_batch_that_does_not_divide_is_named() -> None:
    with pytest.raises(InputError, match="batch_size 6 is no multiple of 8 = 4 examples at a time x 2 proc"):
        loader(SQUARES, in_memory([(8, 8)]), config(), world=2, device_batch=4)


def test_a_share_of_each_batch_is_drilled() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    source = InMemory([Example(str(k), pixels, "a left one" if k < 3 else "b") for k in range(20)])
    data = replace(SQUARES, size=8)
    settings = config(steps=10, batch_size=4, drill=["Left", "right"], drill_share=0.5)
    for batch in loader(data, source, settings):
        assert batch["caption"][:2] == ["a left one"] * 2
        assert batch["row"].tolist() == [0, 1, 2, 3]
    captions = [caption for batch in loader(data, source, settings) for caption in batch["caption"][2:]]
    assert captions.count("a left one") == 3, "the rest is an epoch of all examples"
    (drilled,) = loader(data, source, config(steps=1, batch_size=4, drill=["left"], drill_share=1.0))
    assert drilled["caption"] == ["a left one"] * 4


def test_drilled_words_that_no_caption_has_are_named() -> None:
    with pytest.raises(InputError, match="drill: no caption has one of the words up, down"):
        loader(SQUARES, in_memory([(8, 8)]), config(drill=["up", "down"]))
    with pytest.raises(InputError, match="drill and buckets do not go together"):
        loader(BUCKETS, in_memory(SIZES), config(drill=["image"]))


def damaged_folder(folder: Path, count: int, damaged: set[int]) -> ImageFolder:
    write_folder(folder, count)
    for number in damaged:
        (folder / f"{number:02}.png").write_bytes(encoded(number)[:200])
    return ImageFolder(str(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """The next whole image stands in."""
    source = damaged_folder(tmp_path / "set", 6, {1, 2, 5})
    batches = loader(replace(SQUARES, size=32, workers=workers), source, config(steps=4, batch_size=3))
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert Counter(captions) == {"image 0": 4, "image 3": 6, "image 4": 2}
    assert set(batches.damaged) == {"01.png", "02.png", "05.png"}
    batches.report(tmp_path / "run" / "damaged.txt")
    lines = (tmp_path / "run" / "damaged.txt").read_text().splitlines()
    assert len(lines) == 3
    assert all(line.partition(": ")[2] for line in lines)
    assert caplog.messages[-1].startswith("3 left out of the data, listed in ")


def test_replacements_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    source = damaged_folder(tmp_path, 9, {0, 4, 8})
    data = replace(SQUARES, size=32)
    assert_equal(global_batches(data, source, config(), world=3), global_batches(data, source, config()))


def test_a_report_of_nothing_is_no_file(tmp_path: Path) -> None:
    batches = loader(replace(SQUARES, size=8), in_memory([(8, 8)] * 3), config(steps=1))
    list(batches)
    batches.report(tmp_path / "damaged.txt")
    assert not (tmp_path / "damaged.txt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_damage_is_an_error(tmp_path: Path, workers: int) -> None:
    source = damaged_folder(tmp_path, 3, {0, 1, 2})
    batches = loader(replace(SQUARES, size=32, workers=workers), source, config(steps=1, batch_size=3))
    with pytest.raises(InputError, match=r"data: 3 examples in a row are damaged, such as 0\d\.png: "):
        list(batches)


def test_images_without_a_size_are_in_no_bucket(tmp_path: Path) -> None:
    source = damaged_folder(tmp_path / "set", 4, set())
    (tmp_path / "set" / "02.png").write_bytes(b"no image")
    pixels = Pixels(BUCKETS, source, tmp_path / "sizes")
    assert len(pixels) == 3
    assert pixels.left_out == {"02.png": "its size cannot be read"}
    for file in (tmp_path / "set").glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="data: none of the 4 examples can be read"):
        Pixels(BUCKETS, ImageFolder(str(tmp_path / "set")), tmp_path / "sizes")


def rows_of(batches: list[Batch]) -> Rows:
    """The examples that count."""
    found: Rows = {}
    for batch in batches:
        for k, (row, weight) in enumerate(zip(batch["row"].tolist(), batch["weight"].tolist(), strict=True)):
            if weight:
                assert row not in found
                found[row] = batch["caption"][k], batch["image"][k]
    return found


@BOTH
@pytest.mark.parametrize("count", [7, 1000])
def test_validation_is_the_same_for_any_number_of_processes(data: DataConfig, count: int) -> None:
    """Processes wait for each other, so all of them take equally many batches."""
    source = in_memory(SIZES)
    settings = config(validation_count=count)
    alone = rows_of(list(validation_batches(data, source, settings, device_batch=3)))
    assert alone.keys() == set(range(min(count, 25)))
    assert len({caption for caption, _ in alone.values()}) == len(alone)
    parts = [list(validation_batches(data, source, settings, rank, 3, 3)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    assert_equal({0: rows_of([batch for part in parts for batch in part])}, {0: alone})
    assert all(batch["step"] == -1 for part in parts for batch in part)


def test_validation_is_neither_mirrored_nor_cut_at_random() -> None:
    source = in_memory([(64, 32)] * 3)
    data = replace(SQUARES, size=32, flip=1.0, patch=8)
    (batch,) = validation_batches(data, source, config(validation_count=3), device_batch=3)
    for caption, x in zip(batch["caption"], batch["image"], strict=True):
        assert np.array_equal(shown(x), source[int(caption.split()[1])].image[:, 16:48])


def some_with_maps(count: int, having: set[int], size: int = 32) -> InMemory:
    control = np.zeros((size, size, 3), np.uint8)
    return InMemory(
        [
            Example(
                f"{k}",
                np.full((size, size, 3), k, np.uint8),
                f"{k}",
                {"control": control} if k in having else {},
            )
            for k in range(count)
        ]
    )


def test_examples_without_the_maps_of_others_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """The run failed in mid-training, at the first batch that had both."""
    data = replace(SQUARES, size=32)
    found = loader(data, some_with_maps(6, {0, 2, 5}), config(steps=3, batch_size=3))
    batches = list(found)
    assert {caption for batch in batches for caption in batch["caption"]} == {"0", "2", "5"}
    assert all(batch["control"].shape == (3, 3, 32, 32) for batch in batches)
    assert found.damaged == dict.fromkeys("134", "it has no control")
    assert caplog.messages == [
        "3 of 6 examples are left out, because they have no control, which others have: 1, 3, 4"
    ]


def test_masks_that_are_missing_are_drawn_where_masks_are() -> None:
    mask = {"mask": np.ones((32, 32), np.float32)}
    black = np.zeros((32, 32, 3), np.uint8)
    source = InMemory([Example("a", black, "", mask), Example("b", black, "")])
    assert len(Pixels(replace(SQUARES, size=32, masks=True), source)) == 2
    assert len(Pixels(replace(SQUARES, size=32), source)) == 1


def test_maps_of_different_sizes_are_one_batch() -> None:
    """torch.stack failed on them."""
    maps = [{"control": np.zeros((side, side, 3), np.uint8)} for side in (16, 32, 64)]
    source = InMemory([Example(f"{k}", image(k), "", maps[k]) for k in range(3)])
    (batch,) = loader(replace(SQUARES, size=32), source, config(steps=1, batch_size=3))
    assert batch["control"].shape == (3, 3, 32, 32)
