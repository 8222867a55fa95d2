"""--sign: runs whose files have C2PA manifests, and the certificates that end a run before it begins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("c2pa")

from certificates import Authority, key_pem, written
from commands import SCRIPTS, Result, pixels, refused, script
from cryptography.hazmat.primitives.asymmetric import ec
from image_files import noise
from PIL import Image

from ldm.cli import entry
from ldm.images.metadata import open_image, read_source_type, read_texts
from ldm.images.outputs import OutputFolder
from ldm.images.provenance import ALTERED, TRUSTED, read_provenance, signer_of
from ldm.images.source_type import COMPOSITE, TRAINED
from ldm.pipeline.infotext import read_metadata
from ldm.runs.options import RunOptions

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def keys(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    return authority.files(tmp_path)


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, two images of 16x16 pixels and their grid."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 2, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_every_file_of_a_run_is_signed(txt2img: Command, keys, authority: Authority, format: str) -> None:
    plain = txt2img("--format", format, folder="plain")
    signed = txt2img("--format", format, "--sign", *keys, folder="signed")
    names = [f"grid-0000.{format}", f"samples/00000.{format}", f"samples/00001.{format}"]
    assert (signed.code, signed.err) == (0, [])
    assert plain.files == signed.files == names
    trust = authority.pem.decode()
    for name in names:
        file, other = signed.folder / name, plain.folder / name
        assert np.array_equal(pixels(file), pixels(other))
        assert read_texts(file) == read_texts(other)
        assert read_source_type(file) == read_source_type(other) == TRAINED
        found = read_provenance(file, trust)
        assert (found.state, found.model, found.prompt) == (TRUSTED, "tiny.safetensors", None)
        assert found.model_hash == read_metadata(file)["model_hash"]
        assert read_provenance(other).state == "none"


def test_neither_keys_nor_their_places_are_recorded(txt2img: Command, keys, tmp_path: Path) -> None:
    result = txt2img("--sign", *keys, "--sign_prompt", "--log_file", tmp_path / "log.txt")
    assert read_provenance(result.paths[0]).prompt == "a cat"
    secret = keys[1].read_text().splitlines()[1].encode()
    for path in [*result.folder.rglob("*"), tmp_path / "log.txt"]:
        if path.is_file():
            data = path.read_bytes()
            assert not any(word in data for word in (secret, b"key.pem", b"cert.pem", b"PRIVATE KEY"))


def test_without_settings_the_marks_stay(txt2img: Command, keys) -> None:
    result = txt2img("--no_metadata", "--sign", *keys)
    for path in result.paths:
        assert read_texts(path) == (None, None)
        assert read_source_type(path) == TRAINED
        assert read_provenance(path).state == "valid"


def test_what_reads_settings_reads_signed_files(
    txt2img: Command, keys, model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = txt2img("--seed", 9, "--sign", *keys)
    again = txt2img("--like", first.paths[0], "--n_samples", 1, "--skip_grid", folder="again")
    assert np.array_equal(again.images[0], first.images[0])
    words = [SCRIPTS / "verify.py", first.paths[1], "--config", model[0], "--ckpt", model[1]]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    assert entry.run(script("verify").main) == 0
    assert "identical" in capsys.readouterr().out


def test_a_part_that_was_kept_is_said_to_be(command: Command, model, keys, tmp_path: Path) -> None:
    Image.fromarray(noise(32, 32)).save(tmp_path / "init.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--watermark", "none"]
    argv += ["--init-img", tmp_path / "init.png", "--mask", tmp_path / "mask.png", "--sign", *keys]
    result = command("inpaint", *argv)
    assert read_source_type(result.paths[0]) == COMPOSITE
    assert read_provenance(result.paths[0]).source_type == COMPOSITE


def test_an_image_whose_line_was_not_written_is_not_written_twice(keys, tmp_path: Path) -> None:
    """Two signatures of one image differ; the resumed run took its own file for another's."""
    folder = OutputFolder(tmp_path / "out", sign=signer_of(*keys))
    texts = ("a cat\nSteps: 3", "{}")
    saved = [folder.save_image(noise(16, 16), texts, "cat", again=True) for _ in range(2)]
    assert saved[0] == saved[1]
    others = [
        folder.save_image(255 - noise(16, 16), texts, "cat", again=True),
        folder.save_image(noise(16, 16), ("a dog\nSteps: 3", "{}"), "cat", again=True),
        folder.save_image(noise(16, 24), texts, "cat", again=True),
    ]
    assert [path.name for path in others] == ["cat-2.png", "cat-3.png", "cat-4.png"]
    saved[0].write_bytes(b"damaged")
    assert folder.save_image(noise(16, 16), texts, "cat", again=True).name == "cat-5.png"


def test_a_certificate_is_refused_before_the_model_is_loaded(
    txt2img: Command, keys, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("ldm.runs.run.prepare", loaded)
    cert, key = keys
    other = tmp_path / "other.pem"
    other.write_bytes(key_pem(ec.generate_private_key(ec.SECP256R1())))
    refused(txt2img("--sign", cert, other), f"--sign {cert}: this certificate does not belong to the key")
    refused(txt2img("--sign", cert, tmp_path / "no.pem"), "no.pem: No such file or directory")
    refused(txt2img("--sign", cert, other, "--dry_run"), "does not belong to the key")
    other.write_bytes(key_pem(authority.issue()[1], b"secret"))
    refused(txt2img("--sign", cert, other), "other.pem: the key has a password")
    cert, key = written(tmp_path, *authority.issue(days=-1))
    refused(txt2img("--sign", cert, key), f"--sign {cert}: the certificate expired on 20")
    refused(txt2img("--sign", cert), "argument --sign: expected 2 arguments")
    refused(txt2img("--sign_prompt"), "--sign_prompt without --sign: there is no manifest to name it in")


def test_options_of_a_program() -> None:
    assert RunOptions(sign=["a.pem", "b.pem"]).sign == ("a.pem", "b.pem")
    with pytest.raises(ValueError, match=r"sign: .*: 2 texts are needed, CERT\.pem KEY\.pem"):
        RunOptions(sign=("a.pem",))


def test_an_altered_file_of_a_run_is_seen(txt2img: Command, keys) -> None:
    path = txt2img("--format", "jpg", "--sign", *keys).folder / "samples/00000.jpg"
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)
    with open_image(path) as image:
        image.load()
    assert read_provenance(path).state == ALTERED
