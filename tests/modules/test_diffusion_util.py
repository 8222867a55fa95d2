"""The schedules that models were trained on."""

import numpy as np
import pytest

from ldm.errors import InputError
from ldm.modules.diffusionmodules.util import make_beta_schedule


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        (0.00085, 0.012, 0.99915, 0.0046600985),
        (0.0001, 0.02, 0.9999, 0.00073341246),
        (0.0015, 0.015, 0.9985, 0.00081251847),
        (0.0015, 0.0195, 0.9985, 0.00014230398),
        (0.0015, 0.0205, 0.9985, 9.6910867e-05),
    ],
)
def test_alphas_of_the_families(start, end, first, last):
    alphas = np.cumprod(1.0 - make_beta_schedule("linear", 1000, start, end))
    assert alphas[[0, -1]] == pytest.approx([first, last], rel=1e-6)


def test_other_beta_schedules():
    assert make_beta_schedule("sqrt_linear", 3, 0.1, 0.3) == pytest.approx([0.1, 0.2, 0.3])
    assert make_beta_schedule("sqrt", 3, 0.01, 0.09) == pytest.approx(np.sqrt([0.01, 0.05, 0.09]))
    cosine = make_beta_schedule("cosine", 1000, 0.1, 0.3)
    alphas = np.cumprod(1.0 - cosine)
    t = np.array([0, 100, 500, 900])
    angle = ((np.append(t, 0) + np.array([1, 1, 1, 1, 0])) / 1000 + 0.008) / 1.008 * np.pi / 2
    assert alphas[t] == pytest.approx(np.cos(angle[:-1]) ** 2 / np.cos(angle[-1]) ** 2)
    assert cosine.max() == 0.999
    with pytest.raises(InputError, match="'karras' is not one of linear"):
        make_beta_schedule("karras", 10, 0.1, 0.3)
