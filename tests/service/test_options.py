from dataclasses import replace

import pytest

from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.service.options import ServiceOptions, is_loopback


def test_the_defaults_are_safe() -> None:
    options = ServiceOptions()
    assert is_loopback(options.host)
    assert options.port == 8000
    assert (options.keep, options.log_prompts, options.moderate) == (None, False, None)
    assert options.moderate_failure == "closed"
    assert (options.lora_folder, options.embedding_folder, options.control_folder) == (None, None, None)
    assert options.max_body_bytes == 32 * 2**20


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_this_machine_alone_can_reach_loopback(host: str) -> None:
    assert is_loopback(host)
    assert ServiceOptions(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org", ""])
def test_a_host_beyond_this_machine_needs_tokens(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match=r"host .*can be reached from other machines: give token_file"):
        ServiceOptions(host=host)
    assert ServiceOptions(host=host, token_file="tokens.txt").host == host


def test_a_request_that_could_never_wait_is_refused_at_the_start() -> None:
    with pytest.raises(InputError, match=r"max_images 16 is above queue_size 4"):
        ServiceOptions(queue_size=4)
    assert ServiceOptions(queue_size=4, max_images=4).queue_size == 4


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("port", 65_536, "65,535"),
        ("deadline", 0, "at least|…"),
        ("max_pixels", 1, "64"),
        ("moderate_failure", "maybe", "closed, open"),
        ("queue_size", 0, "1 …"),
        ("loaded_models", 0, "1 …"),
        ("model_wait", -1, "0 …"),
        ("max_body", float("nan"), "number"),
    ],
)
def test_each_value_is_checked(name: str, value: object, words: str) -> None:
    with pytest.raises(InputError, match=f"{name}.*({words})"):
        ServiceOptions(**{name: value})


def test_without_a_number_the_limit_of_pixels_follows_the_model() -> None:
    """An image of 2048 x 2048 by a model of 64 x 64 kept the only worker for minutes."""
    options = replace(ServiceOptions(), port=1)  # also a copy knows that nobody gave it
    assert [options.pixels_of(side) for side in (64, 256, 512, 1024)] == [2**20, 2**20, 2**22, 2**22]
    assert options.max_pixels == 2**22
    assert [ServiceOptions(max_pixels=2**24).pixels_of(side) for side in (64, 1024)] == [2**24] * 2


def test_every_option_says_what_it_does() -> None:
    assert all(each.help for each in settings_of(ServiceOptions).values())
