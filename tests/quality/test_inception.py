"""Inception is shown what pytorch-fid shows it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddsm_engine.errors import MetricError
from ddsm_engine.quality.inception import inception_input
from tests.quality.networks import noise


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 8, 8), (3, 64, 48), (1, 299, 299), (3, 320, 310)])
def test_images_are_what_pytorch_fid_makes_of_our_pngs(shape: tuple[int, int, int]) -> None:
    """Its ToTensor, its interpolate and its 2x - 1, done by torch."""
    images = noise(2, shape, bright=0.1)
    levels = ((torch.from_numpy(images).clamp(-1, 1) + 1) * 127.5).round().byte()
    shown = (levels.float() / 255).expand(-1, 3, -1, -1)
    expected = 2 * F.interpolate(shown, size=(299, 299), mode="bilinear", align_corners=False) - 1
    found = inception_input(images)
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-6


def test_black_and_white_keep_their_values() -> None:
    images = np.concatenate([np.full((1, 1, 4, 4), -1, np.float32), np.full((1, 1, 4, 4), 7, np.float32)])
    black, white = inception_input(images)
    assert np.abs(black + 1).max() < 1e-6
    assert np.abs(white - 1).max() < 1e-6


def test_images_of_two_channels_are_refused() -> None:
    with pytest.raises(MetricError, match="1 or 3 channels, found 2"):
        inception_input(noise(1, (2, 8, 8)))
