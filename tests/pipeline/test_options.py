"""RuntimeOptions: what they take, and which of them an image records."""

from collections.abc import Callable

import pytest
from commands import Result, refused

from ldm.errors import FieldError
from ldm.pipeline import RuntimeOptions

Command = Callable[..., Result]


def test_only_approximations_are_recorded() -> None:
    options = RuntimeOptions(deepcache=2, tome=0.5, low_vram="max", batch_size=4, precision="half")
    assert options.recorded() == {"deepcache": 2, "tome": 0.5}
    assert RuntimeOptions().recorded() == {}


def test_options_that_exclude_each_other() -> None:
    """--eager was ignored silently."""
    with pytest.raises(FieldError, match=r"^compile and eager exclude each other"):
        RuntimeOptions(compile=True, eager=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--precision fp8", "invalid choice: 'fp8'"),
        ("--tome 0.9", "--tome: 0.9 is not a number in range: 0 … 0.75"),
        ("--deepcache 0", "--deepcache: 0 is not a whole number in range"),
        ("--low_vram all", "invalid choice: 'all'"),
        ("--batch_size 0", "--batch_size: 0 is not a whole number in range: at least 1, or auto"),
        ("--batch_size most", "most is not a whole number in range: at least 1, or auto"),
        ("--batch_size 4 --rng compvis", "--batch_size 4: --rng compvis draws for n_samples"),
        ("--batch_size auto --fixed_code", "--batch_size auto: --fixed_code starts for"),
        ("--compile --eager", "--compile and --eager exclude each other"),
        ("--device tpu --watermark none", "--device tpu is not there; this machine has "),
    ],
)
def test_bad_values(command: Command, argv: str, words: str) -> None:
    refused(command("txt2img", *argv.split()), words)
