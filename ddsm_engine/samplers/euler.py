"""Euler's and Heun's method on the probability flow ODE (Karras et al. 2022, algorithm 1 without churn).

The ODE is in z = x / alpha, the sample in units of the clean image: dz/dσ = (z - x_0) / σ with σ the noise ratio.
"""

from ddsm_engine.samplers.grid import Grid, Level
from ddsm_engine.samplers.table import Draft, Row


def draft_euler(draft: Draft, grid: Grid) -> None:
    """One call a step."""
    for t, here, after, is_last in _steps(grid):
        z, slope = _slope(draft, here)
        draft.call(t, (z + (after.ratio - here.ratio) * slope) * _unit(after, is_last))


def draft_heun(draft: Draft, grid: Grid) -> None:
    """Two calls a step, the second where Euler's step ended; the step that ends clean is Euler's alone."""
    ends = [*grid.timesteps[1:], 0.0]
    for (t, here, after, is_last), t_after in zip(_steps(grid), ends, strict=True):
        z, slope = _slope(draft, here)
        span = after.ratio - here.ratio
        if after.ratio == 0:
            draft.call(t, (z + span * slope) * _unit(after, is_last))
            continue
        draft.call(t, (z + span * slope) * after.alpha, z + span / 2 * slope)
        _, slope = _slope(draft, after)
        draft.call(t_after, (draft.kept[0] + span / 2 * slope) * _unit(after, is_last))


def _steps(grid: Grid) -> list[tuple[float, Level, Level, bool]]:
    steps = len(grid.timesteps)
    return [(t, grid.levels[i], grid.levels[i + 1], i == steps - 1) for i, t in enumerate(grid.timesteps)]


def _slope(draft: Draft, level: Level) -> tuple[Row, Row]:
    """The sample z and its slope dz/dσ at a level."""
    x_0, _ = draft.predict(level)
    z = draft.x / level.alpha
    return z, (z - x_0) / level.ratio


def _unit(level: Level, is_last: bool) -> float:  # noqa: FBT001
    """From z to what the next call reads; the last call leaves z, which is the image."""
    return 1.0 if is_last else level.alpha
