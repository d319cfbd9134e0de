"""The table that a sampler is, and the pen that writes it in the notation of the papers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError
from ddsm_engine.samplers.grid import Level

Row = NDArray[np.float64]
"""A quantity of a run as the coefficients of what is at hand in a call: the slots, the network's output, the bounded
clean image, fresh noise. Rows add and scale as the quantities do."""

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""What the network was trained to answer: the noise, the clean image, or v (Salimans and Ho 2022)."""

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, slots=True)
class Clip:
    """Clip every predicted clean image to ± ``limit``."""

    limit: float

    def apply(self, x_0: NDArray[np.float32]) -> None:
        """Bound a batch [B, C, H, W] in place."""
        np.clip(x_0, -self.limit, self.limit, out=x_0)


@dataclass(frozen=True, slots=True)
class DynamicThreshold:
    """Clip each predicted clean image to ± s and divide it by s (Saharia et al. 2022, section 2.3).

    s is a quantile of the image's own magnitudes, at least 1 and at most ``largest``, which goes before. Not linear: a
    backend that captures a run as a graph cannot take it along.
    """

    quantile: float
    largest: float

    def apply(self, x_0: NDArray[np.float32]) -> None:
        """Bound a batch [B, C, H, W], C-contiguous, in place."""
        images = x_0.reshape(len(x_0), -1)
        magnitudes = np.quantile(np.abs(images), self.quantile, axis=1, keepdims=True)
        most = np.minimum(np.maximum(magnitudes, 1), self.largest).astype(images.dtype)
        np.clip(images, -most, most, out=images)
        np.divide(images, most, out=images)


Bound = Clip | DynamicThreshold


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """A table with one row per call, first executed call first.

    The state is a handful of slots of the sample's shape. Slot 0 is the sample as the network reads it, at unit
    variance (x_t of the variance-preserving process, whatever scale the paper of the sampler works in); the others
    hold what later calls need. A call evaluates the network on slot 0, bounds the clean image that it predicts where
    ``bound`` says so, and replaces all slots at once:

        x_0   = bound(to_x_0 · (slot 0, output))
        slots = update · (slots…, output, x_0, noise)

    Without a bound x_0 is linear in slot 0 and the output, so its part is folded into theirs. That also avoids the
    papers' cancellation: at the noisy end x_0 is 157 times a difference of near equals.

    Attributes:
        name: As ``make_sampler`` takes it: ``ddim``, ``heun:karras``.
        steps: As asked for; Heun makes two calls in all but the last of them.
        timesteps: [calls], float64, the training timestep whose features the network reads; may be fractional.
        start: Standard deviation of the initial sample.
        to_x_0: [calls, 2], float64, coefficients of slot 0 and the output in the predicted clean image.
        update: [calls, slots, slots + 3], float64.
        bound: What is done to a predicted clean image; None: nothing, as DDSM was published.
        options: What ``make_sampler`` was told beside name and steps, as JSON values: ``eta`` and ``clip_sample`` where
            given, ``config`` where the name does not say it all. With them it makes the same table again.
    """

    name: str
    steps: int
    timesteps: NDArray[np.float64]
    start: float
    to_x_0: NDArray[np.float64]
    update: NDArray[np.float64]
    bound: Bound | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Number of calls."""
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        """Arrays of the sample's shape that the state takes."""
        return int(self.update.shape[1])


class Draft:
    """A table being written: a sampler's own formulas, evaluated on rows, are its coefficients.

    Attributes:
        x: The sample as the network reads it (slot 0).
        kept: The other slots, as the call before left them.
        noise: Fresh standard normals.
    """

    def __init__(self, kept: int, prediction_type: PredictionType, bound: Bound | None) -> None:
        """Begin with ``kept`` slots beside the sample's."""
        basis = np.eye(kept + 4)
        self.x: Row = basis[0]
        self.kept: Sequence[Row] = tuple(basis[1 : kept + 1])
        self._output, self._bounded, self.noise = basis[kept + 1 :]
        self._prediction_type, self._bound = prediction_type, bound
        self._to_x_0: Row = np.zeros(2)
        self._calls: list[tuple[float, Row, NDArray[np.float64]]] = []

    def predict(self, level: Level) -> tuple[Row, Row]:
        """What the network says of ``x`` at a noise level: the clean image, bounded where there is a bound, and ε."""
        x, out, alpha, sigma = self.x, self._output, level.alpha, level.sigma
        match self._prediction_type:
            case "epsilon":
                x_0, eps = (x - sigma * out) / alpha, out
            case "sample":
                x_0, eps = out, (x - alpha * out) / sigma
            case "v_prediction":
                x_0, eps = alpha * x - sigma * out, alpha * out + sigma * x
        self._to_x_0 = np.array([x_0 @ x, x_0 @ out])
        return (x_0 if self._bound is None else self._bounded), eps

    def call(self, timestep: float, x: Row, *kept: Row) -> None:
        """End a call: what the sample and the other slots become; those not named are not read again."""
        unread = [np.zeros_like(x)] * (len(self.kept) - len(kept))
        self._calls.append((timestep, self._to_x_0, np.stack([x, *kept, *unread])))

    def finish(self, name: str, steps: int, start: float = 1.0) -> Sampler:
        """The finished table.

        Raises:
            SamplerError: a coefficient that is not finite: two calls at one noise level, or a formula that ends at
                another level than this one does.
        """
        timesteps, to_x_0, update = zip(*self._calls, strict=True)
        table = np.stack(update)
        if not np.isfinite(table).all():
            call = int(np.argmin(np.isfinite(table).all(axis=(1, 2))))
            raise SamplerError(
                f"{name} with {steps} steps cannot be computed: call {call} (timestep {timesteps[call]:g}) has no "
                f"finite coefficients; expected noise levels that fall from call to call: take fewer steps, or another "
                f"grid or final level"
            )
        return Sampler(name, steps, np.array(timesteps, np.float64), start, np.stack(to_x_0), table, self._bound)
