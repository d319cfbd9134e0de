"""Pixels as they are: what a kernel distance reads where there is no feature network."""

from dataclasses import dataclass

from ddsm_engine.errors import MetricError
from ddsm_engine.quality.metric import Identity, Images, Rows


@dataclass(frozen=True, slots=True)
class Pixels:
    """The values of images of this shape [C, H, W], each in one row."""

    shape: tuple[int, int, int]

    @property
    def identity(self) -> Identity:
        """See ``Description``."""
        return {"description": "pixels", "shape": "x".join(map(str, self.shape))}

    def __call__(self, images: Images) -> Rows:
        """[N, C, H, W] → [N, C * H * W].

        Raises:
            MetricError: images of another shape.
        """
        if images.shape[1:] != self.shape:
            raise MetricError(f"expected images {list(self.shape)}, found {list(images.shape[1:])}")
        return images.reshape(len(images), -1)
