"""The nearest training images: against all pairs at once, planted copies, files of features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_evaluation import write_clip

from ldm.errors import InputError
from ldm.evaluation import nearest
from ldm.evaluation.nearest import (
    ALTERATIONS,
    Index,
    Pixels,
    Planted,
    calibrate,
    found_again,
    make_index,
    open_index,
    plant,
    vectors,
)
from ldm.scenes.detector import Detector, save_detector
from ldm.training.data.example import DamagedExample, Example, InMemory


def noise_images(count: int, seed: int = 0, side: int = 24) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8))


def source_of(images: list[np.ndarray]) -> InMemory:
    return InMemory([Example(f"{k}.png", image, "") for k, image in enumerate(images)])


@pytest.fixture
def index(tmp_path: Path) -> Index:
    make_index(tmp_path / "index.safetensors", source_of(noise_images(50)), Pixels())
    return Index(tmp_path / "index.safetensors")


def test_the_file_holds_vectors_of_length_one(index: Index) -> None:
    """A safetensors file that other programs read."""
    found = load_file(index.path)["features"]
    assert (found.dtype, tuple(found.shape)) == (torch.float16, (50, Pixels.size))
    assert found.float().norm(dim=1).numpy() == pytest.approx(np.ones(50), abs=1e-3)
    torch.testing.assert_close(found.float(), vectors(noise_images(50), Pixels()), atol=1e-3, rtol=0)
    torch.testing.assert_close(index.rows([3, 40]), found[[3, 40]].float(), atol=1e-3, rtol=0)


def test_an_exact_copy_has_a_similarity_of_1(index: Index) -> None:
    """Rows of 16 bits are not quite as long as they should be: --threshold 1 flagged no copy."""
    assert index.rows(range(50)).norm(dim=1).numpy() == pytest.approx(np.ones(50), abs=1e-6)
    similarity, rows = nearest.nearest(index, vectors(noise_images(50), Pixels()), 1)
    assert rows[:, 0].tolist() == list(range(50))
    report = nearest.Report([""] * 50, similarity, rows, source_of(noise_images(50)), 1.0)
    assert report.flagged.all()
    assert all(line["flagged"] for line in report.lines())
    planted = [Planted(k, "exact", image) for k, image in enumerate(noise_images(50))]
    assert found_again(planted, rows[:, 0], similarity[:, 0], 1.0, false=0)["recall of all"] == 1
    assert not nearest.is_copy(np.float32(0.9999), 1.0)


def test_images_are_read_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples, and all held-out images, were in memory at once."""
    monkeypatch.setattr(nearest, "BATCH", 4)
    read, seen = [], []

    class Watching(Pixels):
        def __call__(self, images: list[np.ndarray]) -> torch.Tensor:
            seen.append((len(images), len(read)))
            return super().__call__(images)

    def images() -> Iterator[np.ndarray]:
        for image in noise_images(10):
            read.append(image)
            yield image

    found = vectors(images(), Watching())
    assert seen == [(4, 4), (4, 8), (2, 10)]
    torch.testing.assert_close(found, vectors(noise_images(10), Pixels()))
    assert vectors([], Pixels()).shape == (0, Pixels.size)


def test_blocks_find_what_all_pairs_have(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "ROWS", 7)
    monkeypatch.setattr(nearest, "QUERIES", 4)
    queries = vectors(noise_images(11, seed=1), Pixels())
    similarity, rows = nearest.nearest(index, queries, 5)
    every = queries @ torch.nn.functional.normalize(load_file(index.path)["features"].float()).T
    best, order = every.topk(5, 1)
    np.testing.assert_allclose(similarity, best.numpy(), atol=1e-6)
    np.testing.assert_array_equal(rows, order.numpy())


def test_a_row_can_be_left_out_and_few_rows_end_in_nothing(tmp_path: Path) -> None:
    make_index(tmp_path / "i", source_of(noise_images(3)), Pixels())
    index = Index(tmp_path / "i")
    similarity, rows = nearest.nearest(index, index.rows([0, 1, 2]), 4, without=[0, 1, 2])
    assert all(k not in row for k, row in enumerate(rows.tolist()))
    assert rows[:, 2:].tolist() == [[row[2], -1] for row in rows.tolist()]
    assert (similarity[:, 2:] == -1).all()
    assert (nearest.nearest(index, index.rows([0, 1, 2]), 1)[1][:, 0] == [0, 1, 2]).all()


class Damaged(InMemory):
    def __getitem__(self, index: int) -> Example:
        if index in (1, 4):
            raise DamagedExample(self.key(index), "it is torn")
        return super().__getitem__(index)


def test_damaged_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Damaged(source_of(noise_images(6)).examples)
    make_index(tmp_path / "i", source, Pixels())
    assert "2 training images cannot be read" in caplog.text
    assert "1.png" in caplog.text
    index = Index(tmp_path / "i")
    assert index.rows([1, 4]).isnan().all()
    assert index.readable.tolist() == [0, 2, 3, 5]
    _, rows = nearest.nearest(index, vectors(noise_images(6), Pixels()), 1)
    assert rows[[0, 2, 3, 5], 0].tolist() == [0, 2, 3, 5]
    assert not {1, 4}.intersection(rows[:, 0].tolist())


def test_copies_are_planted_of_images_that_can_be_read(tmp_path: Path) -> None:
    """A damaged image among those that were drawn ended the command."""
    source = Damaged(source_of(noise_images(6)).examples)
    make_index(tmp_path / "i", source, Pixels())
    planted = plant(source, Index(tmp_path / "i"), 6, 0)
    assert {each.row for each in planted} == {0, 2, 3, 5}
    assert len(planted) == 4 * len(ALTERATIONS)


def test_no_image_can_be_read(tmp_path: Path) -> None:
    """It was an IndexError, after all samples had been read."""
    damaged = Damaged(source_of(noise_images(6)).examples)
    damaged.__class__ = type("All", (Damaged,), {"__getitem__": lambda self, k: Damaged.__getitem__(self, 1)})
    with pytest.raises(InputError, match="no training image could be compared: none of 6 can be read"):
        open_index(tmp_path / "i", damaged, Pixels(), given=True)


def test_images_of_one_grey_are_alike(tmp_path: Path) -> None:
    """They were taken for damaged ones, or were compared by what rounding had left of them."""
    grey = [np.full((24, 24, 3), level, np.uint8) for level in (0, 77, 201)]
    make_index(tmp_path / "i", source_of([*noise_images(3), *grey[:2]]), Pixels())
    index = Index(tmp_path / "i")
    assert index.readable.tolist() == [0, 1, 2, 3, 4]
    similarity, rows = nearest.nearest(index, vectors([grey[2], noise_images(1)[0]], Pixels()), 5)
    assert similarity[0].tolist() == [1, 1, 0, 0, 0]
    assert set(rows[0, :2]) == {3, 4}
    assert rows[1, 0] == 0


def test_an_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = source_of(noise_images(5)), tmp_path / "deep" / "i"
    open_index(path, source, Pixels(), given=True)
    monkeypatch.setattr(nearest, "make_index", lambda *_: pytest.fail("it is there"))
    assert open_index(path, source, Pixels(), given=True).count == 5


class Other(Pixels):
    name = "other"


def test_an_index_of_another_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, path = source_of(noise_images(5)), tmp_path / "i"
    make_index(path, source, Pixels())
    for wanted, of, words in (
        (source, Other(), "features pixels-8; wanted: other"),
        (source_of(noise_images(5, seed=1)), Pixels(), "training set"),
        (source_of(noise_images(4)), Pixels(), "images 5; wanted"),
    ):
        with pytest.raises(InputError, match=r"index .* is of another kind") as error:
            open_index(path, wanted, of, given=True)
        assert words in str(error.value)
    assert open_index(path, source, Other(), given=False).facts["features"] == "other"
    assert "it is made anew" in caplog.text


@pytest.mark.parametrize("content", ["", "text", "other"])
def test_a_file_that_is_no_index(tmp_path: Path, content: str) -> None:
    path = tmp_path / "i"
    if content == "other":
        save_file({"weights": torch.zeros(2)}, path)
    else:
        path.write_text(content)
    with pytest.raises(InputError, match="is not an index of features"):
        open_index(path, source_of(noise_images(2)), Pixels(), given=True)


def test_a_threshold_leaves_the_share_that_was_asked_for(tmp_path: Path) -> None:
    """Of held-out images, and of training images against the others."""
    source, held_out = source_of(noise_images(60)), source_of(noise_images(40, seed=9))
    make_index(tmp_path / "i", source, Pixels())
    index = Index(tmp_path / "i")
    found = calibrate(index, Pixels(), held_out, 0.1, 1000, 0)
    queries = vectors([example.image for example in held_out.examples], Pixels())
    similarity = nearest.nearest(index, queries, 1)[0][:, 0]
    assert (similarity > found.threshold).sum() == 4
    assert found.images == 40
    assert found.median == pytest.approx(np.median(similarity))
    own = calibrate(index, Pixels(), None, 0.1, 1000, 0)
    assert own.images == 60
    assert own.highest < 0.99  # no image is compared with itself
    assert "training images, compared with all others" in str(own)


def test_a_threshold_of_one_image(tmp_path: Path) -> None:
    make_index(tmp_path / "i", source_of(noise_images(1)), Pixels())
    with pytest.raises(InputError, match="give one with --threshold"):
        calibrate(Index(tmp_path / "i"), Pixels(), None, 0.01, 10, 0)


def smooth_images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Images that an alteration leaves recognisable: random 4x4 colours, enlarged."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(40, 216, (count, 4, 4, 3), np.uint8)
    return [np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC)) for one in small]


def test_planted_copies_are_found(tmp_path: Path) -> None:
    source = source_of(smooth_images(40))
    make_index(tmp_path / "i", source, Pixels())
    planted = plant(source, Index(tmp_path / "i"), 10, 3)
    assert len(planted) == 10 * len(ALTERATIONS)
    assert all((each.image == source[each.row].image).all() for each in planted if each.alteration == "exact")
    assert all(each.image.shape == (64, 64, 3) for each in planted)
    changed = [each for each in planted if each.alteration != "exact"]
    assert all((each.image != source[each.row].image).any() for each in changed)
    queries = vectors([each.image for each in planted], Pixels())
    similarity, rows = nearest.nearest(Index(tmp_path / "i"), queries, 1)
    found = found_again(planted, rows[:, 0], similarity[:, 0], 0.9, false=5)
    crop = found["recall"].pop("crop to 90 % of the side")  # which shifts what is in a pixel
    assert 0.5 <= crop <= 1
    assert set(found["recall"].values()) == {1.0}
    assert found["recall of all"] == pytest.approx((4 + crop) / 5)
    assert found["precision"] == pytest.approx((40 + 10 * crop) / 55, abs=0.1)


def test_recall_and_precision_are_counted() -> None:
    """A copy that is flagged for another image is not found, and what is not flagged neither."""
    image = np.zeros((1, 1, 3), np.uint8)
    planted = [Planted(row, name, image) for name in ("a", "b") for row in (0, 1)]
    rows, similarity = np.array([0, 5, 0, 1]), np.array([0.9, 0.95, 0.4, 0.8])
    found = found_again(planted, rows, similarity, 0.8, false=1)
    assert found["recall"] == {"a": 0.5, "b": 0.5}
    assert found["recall of all"] == 0.5
    assert found["precision"] == 2 / 4


def test_the_detectors_features(tmp_path: Path) -> None:
    """The input of its last layer, of images of any size."""
    torch.manual_seed(0)
    save_detector(Detector(), tmp_path / "detector.safetensors")
    features = nearest.Scenes(tmp_path / "detector.safetensors", torch.device("cpu"))
    images = [noise_images(1, side=64)[0], noise_images(1, side=128)[0]]
    found = features(images)
    assert tuple(found.shape) == (2, features.size)
    inputs: list[torch.Tensor] = []
    features.detector.layers[-1].register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    features.detector.read(images[:1])
    torch.testing.assert_close(found[:1], inputs[0])


def test_float32_is_not_rounded_on_a_gpu(tmp_path: Path, events: list[object]) -> None:
    """The detector's convolutions had TF32 on CUDA: an index of another machine was less alike."""
    save_detector(Detector(), tmp_path / "detector.safetensors")
    features = nearest.Scenes(tmp_path / "detector.safetensors", torch.device("cpu"))
    features.detector.layers[0].register_forward_hook(lambda *_: events.append("network"))
    features(noise_images(1, side=64))
    assert events == [torch.device("cpu"), "network", "left"]


def test_clips_features(tmp_path: Path, events: list[object]) -> None:
    """The image embeddings of transformers' own model."""
    import transformers

    folder = write_clip(tmp_path / "clip")
    features = nearest.Clip(str(folder), torch.device("cpu"))
    images = noise_images(3, side=40)
    found = features(images)
    assert events == [torch.device("cpu"), "left"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = features.clip.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=pixels)
    wanted = getattr(wanted, "pooler_output", wanted)  # from transformers 5 on
    torch.testing.assert_close(found, wanted)
    assert found.shape[1] == features.size
    assert (
        nearest.Clip(str(write_clip(tmp_path / "other", seed=1)), torch.device("cpu")).name != features.name
    )


def test_the_sheet_begins_with_the_nearest(tmp_path: Path) -> None:
    images = smooth_images(6)
    source = source_of(images)
    similarity = np.array([[0.5, 0.1], [0.99, 0.2], [0.7, -1]], np.float32)
    rows = np.array([[0, 1], [2, 3], [4, -1]])
    report = nearest.Report(["a", "b", "c"], similarity, rows, source, 0.9)
    assert report.flagged.tolist() == [False, True, False]
    lines = list(report.lines())
    assert len(lines) == 5
    assert lines[2] == {
        "sample": "b", "rank": 1, "similarity": 0.99, "training image": "2.png", "number": 2, "flagged": True,
    }  # fmt: skip
    sheet = report.sheet(images.__getitem__, most=2)
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] > 2 * 128
    assert report.sheet(images.__getitem__, most=3).shape[0] - sheet.shape[0] >= 128
