import copy
from pathlib import Path

import pytest

from ldm.errors import FieldError, InputError
from ldm.pipeline.request import ImageRequest
from ldm.service.errors import (
    Cancelled,
    DeadlinePassed,
    LimitExceeded,
    QueueFull,
    ServiceError,
    UnknownJob,
    UnknownModel,
    from_input_error,
    in_names,
)


def test_a_field_error_names_the_field_in_plain_words() -> None:
    with pytest.raises(FieldError) as caught:
        ImageRequest("a cube", steps=0)
    error = from_input_error(caught.value)
    assert error.message.startswith("steps: 0 is not")
    assert (error.status, error.code, error.headers) == (422, "invalid_request", {})


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            LimitExceeded("scale: 9 is not above init_img's scale"),
            "cfg_scale: 9 is not above init_images's scale",
        ),
        (
            from_input_error(FieldError("{scale} 3 with {init_img} of /a/b.png, {why}", why="a scale")),
            "cfg_scale 3 with init_images of b.png, a scale",
        ),
        (from_input_error(InputError("no scale: none")), "no scale: none"),
        (QueueFull(3), QueueFull(3).message),
    ],
)
def test_a_contract_names_settings_as_its_clients_do(error: ServiceError, shown: str) -> None:
    """Only the word that a message began with was renamed; OpenAI's clients read our names."""
    with pytest.raises(type(error)) as caught, in_names({"init_img": "init_images", "scale": "cfg_scale"}):
        raise error
    found = caught.value
    assert (found.message, str(found)) == (shown, shown)
    assert (found.status, found.code, found.headers) == (error.status, error.code, error.headers)
    with pytest.raises(type(error)) as again, in_names({"image": "picture"}):  # it has its names already
        raise found
    assert again.value.message == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/models/secret/one.ckpt is no checkpoint", "one.ckpt is no checkpoint"),
        ("nothing in '/srv/loras/a.safetensors' fits", "nothing in 'a.safetensors' fits"),
        ("give a width/height of 64, 1/2 or a/b", "give a width/height of 64, 1/2 or a/b"),
        ("two\nlines\r\nand more", "two lines and more"),
    ],
)
def test_a_message_is_one_line_without_the_services_folders(text: str, shown: str) -> None:
    assert from_input_error(InputError(text)).message == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'/srv/my loras/one.pt' is no LoRA", "'one.pt' is no LoRA"),
        ("/srv/my loras/one.pt is no LoRA", "one.pt is no LoRA"),
        ("neither as a path nor in /srv/my loras (lora_folder)", "nor in the service's folder (lora_folder)"),
        ("some/where/net.pt: no", "net.pt: no"),
        ("loras/one.pt: no loras", "one.pt: no loras"),
        ("two somewhere/else and half/loras/x", "two somewhere/else and half/loras/x"),
    ],
)
def test_the_services_own_folders_are_not_shown(text: str, shown: str) -> None:
    """A folder's name up to its first space was cut out, and a relative folder stayed."""
    folders = [Path("/srv/my loras"), Path("some/where"), Path("loras"), Path()]
    assert from_input_error(InputError(text), folders).message.endswith(shown)


def test_retry_after_is_a_whole_number_of_seconds_above_0() -> None:
    assert QueueFull(0.01).headers == {"Retry-After": "1"}
    assert QueueFull(12.3).headers == {"Retry-After": "13"}
    assert "13 s" in QueueFull(12.3).message


def test_names_of_clients_are_quoted_and_short() -> None:
    error = UnknownModel("a\r\nSet-Cookie: x" * 100, ["tiny", "large"])
    assert "\n" not in error.message
    assert len(error.message) < 200
    assert error.message.endswith("choose from tiny, large")
    assert UnknownJob("x").status == 404


@pytest.mark.parametrize(
    "error", [QueueFull(3), UnknownJob("x"), UnknownModel("a", ["b"]), Cancelled(), DeadlinePassed(2.0)]
)
def test_a_copy_has_headers_of_its_own(error: ServiceError) -> None:
    twin = copy.copy(error)
    assert type(twin) is type(error)
    assert (str(twin), vars(twin)) == (str(error), vars(error))
    twin.headers["X-Request-Id"] = "1"
    assert "X-Request-Id" not in error.headers
