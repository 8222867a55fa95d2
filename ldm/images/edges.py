"""Edges of an image by Canny's method, as ControlNets of that name were trained on them."""

import numpy as np

from ldm.errors import InputError


def canny(pixels: np.ndarray, low: float = 100.0, high: float = 200.0) -> np.ndarray:
    """White edges on black, uint8 [H, W, 3], of an image, uint8 [H, W, 3].

    A pixel is on an edge if its gradient is above `high`, or above `low` and next to one that is (Canny 1986;
    https://docs.opencv.org/4.x/da/d22/tutorial_py_canny.html). InputError without OpenCV.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError("canny needs OpenCV: pip install opencv-python-headless") from error
    edges = cv2.Canny(np.ascontiguousarray(pixels), low, high)
    return np.repeat(edges[:, :, None], 3, axis=2)
