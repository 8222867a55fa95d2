"""Fréchet distances in closed form and against torch-fidelity; files of networks and statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import pictures, write_inception

from ldm.errors import InputError
from ldm.evaluation.fid import (
    FrechetDistance,
    Inception,
    Statistics,
    check_inception,
    frechet_distance,
    load_statistics,
    save_statistics,
)

pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


def test_normal_distributions_of_known_moments() -> None:
    """|m1 - m2|^2 + sum of (s1 - s2)^2 where both covariances have the same axes."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    s1, s2 = rng.uniform(0.1, 3, (2, 6))
    m1, m2 = rng.normal(size=(2, 6))
    one = Statistics(m1, (axes * s1**2) @ axes.T)
    other = Statistics(m2, (axes * s2**2) @ axes.T)
    wanted = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)


def test_other_axes_as_by_scipy() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    one, other = (Statistics.of(rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8))) for _ in range(2))
    traces = np.trace(one.covariance + other.covariance - 2 * sqrtm(one.covariance @ other.covariance).real)
    wanted = np.square(one.mean - other.mean).sum() + traces
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-8)


def test_influences_are_derivatives() -> None:
    """A sample in which one image counts a little more is farther by its influence times the excess."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(200, 4))
    distance = FrechetDistance(Statistics(np.ones(4), 2 * np.eye(4) + 0.5))
    value, influences = distance(features)
    for k in (0, 17, 101):
        weights = np.ones(200)
        weights[k] += 1e-4
        weights /= weights.sum()
        mean = weights @ features
        covariance = (features - mean).T @ ((features - mean) * weights[:, None]) * 200 / 199
        moved = distance.of_statistics(Statistics(mean, covariance)) - value
        assert moved / (1e-4 / 200) == pytest.approx(influences[k], rel=0.01, abs=0.05)


@pytest.mark.parametrize("layer", ["192", pytest.param("768", marks=pytest.mark.slow)])
def test_fid_is_torch_fidelitys(inception: Path, tmp_path: Path, layer: str) -> None:
    from torch_fidelity import calculate_metrics

    sets = [pictures(12, seed) for seed in (0, 1)]
    sets[1] = [255 - image // 2 for image in sets[1]]
    for name, images in zip("ab", sets, strict=True):
        (tmp_path / name).mkdir()
        for k, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{k:02}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no processes to load images
        batch_size=4,
        feature_extractor_weights_path=str(inception),
        feature_layer_fid=layer,
    )
    network = Inception(inception, torch.device("cpu"), layer)
    one, other = (np.concatenate([network(part) for part in (s[:5], s[5:])]) for s in sets)
    assert one.shape == (12, network.dimensions)
    mine, _ = FrechetDistance(Statistics.of(other))(one)
    assert mine == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert mine > 1e-3


def test_features_are_those_of_the_last_layer(inception: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = pictures(2, 0)
    network = FeatureExtractorInceptionV3("it", ["2048"], feature_extractor_weights_path=str(inception))
    (theirs,) = network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    mine = Inception(inception, torch.device("cpu"))(images)
    assert (mine.shape, mine.dtype) == ((2, 2048), np.float64)
    assert np.array_equal(mine.astype(np.float32), theirs.numpy())


def test_float32_is_not_rounded_on_a_gpu(inception: Path, events: list[object]) -> None:
    """Convolutions had TF32 on CUDA, 10 bits: another FID than on a CPU."""
    network = Inception(inception, torch.device("cpu"), "64")
    network.network.register_forward_hook(lambda *_: events.append("network"))
    network(pictures(1, 0))
    assert events == [torch.device("cpu"), "network", "left"]


def test_statistics_are_saved_and_read(tmp_path: Path) -> None:
    statistics = Statistics.of(np.random.default_rng(0).normal(size=(9, 3)))
    save_statistics(tmp_path / "reference.npz", statistics)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]
    again = load_statistics(tmp_path / "reference.npz", 3)
    assert np.array_equal(again.mean, statistics.mean)
    assert np.array_equal(again.covariance, statistics.covariance)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        load_statistics(path, 3)
    for word in (*words, "mu [3] and sigma [3, 3]"):
        assert word in str(error.value)


def test_statistics_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    refused(path, "has mu [4] and sigma [4, 4]")
    np.savez(path, mean=np.zeros(3))
    refused(path, "has no mu and sigma")
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    refused(path, "not finite")
    path.write_bytes(b"PK\x03\x04 torn")
    refused(path, "is no .npz")
    path.write_text("words")
    refused(path, "is no .npz")


def test_networks_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    names = {"Mixed_7c.branch_pool.conv.weight": torch.zeros(1), "fc.weight": torch.zeros(1000, 2048)}

    def refusal() -> str:
        with pytest.raises(InputError) as error:
            check_inception(path)
        assert "weights-inception-2015-12-05-6726825d.pth" in str(error.value)
        return str(error.value)

    assert "is not there" in refusal()
    torch.save(names, path)
    assert "it is torchvision's" in refusal()
    torch.save({"weight": torch.zeros(3)}, path)
    assert "is not the Inception-v3 that FID is defined by" in refusal()
    path.write_text("<html>Not found")
    assert "is not the Inception-v3" in refusal()


def test_torch_fidelity_is_missing(inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"FID needs torch-fidelity: pip install -e \"\.\[evaluation\]\""):
        check_inception(inception)
