"""Group norm and SiLU against float64, in Triton's interpreter; and that the kernels compile for real GPUs.

The interpreter is chosen when Triton is imported, so both happen in processes of their own, one for all cases.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from ddsm_kernels.group_norm_silu import (
    DTYPES,
    GROUP_VALUES,
    SPLITS,
    TILE_VALUES,
    group_norm_silu,
    group_norm_silu_reference,
    traffic_bytes,
)

ROOT = Path(__file__).parents[2]

TOLERANCES = {
    # Sums of up to 10⁵ values in another order (observed up to 1.5e-7).
    torch.float32: 5e-7,
    # One rounding, of the result (observed 2.3e-4).
    torch.float16: 5e-4,
    # The same; the interpreter cuts bits off instead of rounding (observed 3.6e-3), which doubles it.
    torch.bfloat16: 6e-3,
}
"""Relative L2 by type."""


@dataclass(frozen=True)
class Case:
    channels: int
    height: int
    width: int
    groups: int = 16
    batch: int = 1
    dtype: torch.dtype = torch.float32
    centre: float = 0.5
    spread: float = 2.0
    silu: bool = True
    weight_dtype: torch.dtype = torch.float32

    @property
    def launches(self) -> int:
        """By the kernel's own rule: one where a padded group fits into a program."""
        pixels, group = self.height * self.width, self.channels // self.groups
        padded = (1 << (pixels - 1).bit_length()) * (1 << (group - 1).bit_length())
        return 1 if padded <= GROUP_VALUES else 2


CASES = {
    **{f"width {c} {dtype}": Case(c, 16, 16, dtype=dtype) for c in range(32, 129, 16) for dtype in DTYPES},
    **{f"batch of {b}": Case(48, 8, 8, batch=b) for b in (2, 3, 5)},
    **{f"two launches, batch of {b}": Case(32, 64, 64, batch=b, groups=4) for b in (1, 3)},
    **{f"two launches {dtype}": Case(48, 64, 64, groups=4, dtype=dtype) for dtype in DTYPES},
    "the largest that one launch takes": Case(256, 32, 32, dtype=torch.bfloat16),
    "one channel a group": Case(16, 16, 16),
    "seven channels a group": Case(112, 8, 8),
    "sixty-four channels a group": Case(256, 8, 8, groups=4),
    "sixty-four channels a group, two launches": Case(256, 32, 32, groups=4),
    "three groups": Case(21, 8, 8, groups=3),
    "three groups of seven, two launches": Case(21, 64, 64, groups=3),
    "joined with a skip": Case(512, 16, 16, dtype=torch.bfloat16),
    "joined with a skip, two launches of several tiles": Case(512, 40, 40, dtype=torch.float16),
    "four by four": Case(128, 4, 4, batch=2),
    "one pixel": Case(32, 1, 1),
    "no power of two of pixels": Case(32, 5, 7, batch=2),
    "no power of two of pixels or channels, two launches": Case(112, 48, 56),
    "the last program has less to do, two launches": Case(64, 65, 67),
    "the largest image, two launches": Case(32, 128, 128),
    "far from zero": Case(32, 16, 16, centre=1000.0, spread=1.0),
    "far from zero, two launches": Case(32, 64, 64, groups=4, centre=1000.0, spread=1.0),
    "squares beyond float16": Case(32, 16, 16, dtype=torch.float16, centre=3000.0, spread=500.0),
    "no spread at all": Case(32, 16, 16, spread=0.0),
    "no spread at all, two launches": Case(32, 64, 64, groups=4, spread=0.0),
    "the norm alone": Case(64, 8, 8, silu=False),
    "the norm alone, two launches": Case(32, 64, 64, silu=False, groups=4),
    "weights of the images' type": Case(64, 8, 8, dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
}


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Channels-last images whose channels differ in mean, weights and biases."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.channels, case.height, case.width)
    x = torch.randn(shape, generator=generator) * case.spread + case.centre
    if case.spread:
        x += torch.randn(1, case.channels, 1, 1, generator=generator)
    weight, bias = torch.randn(2, case.channels, generator=generator).to(case.weight_dtype)
    return x.to(case.dtype).to(memory_format=torch.channels_last), weight, bias


def expected(case: Case, *, groups: int | None = None) -> torch.Tensor:
    """By torch, in float64."""
    x, weight, bias = tensors(case)
    y = F.group_norm(x.double(), groups or case.groups, weight.double(), bias.double(), 1e-5)
    return F.silu(y) if case.silu else y


def relative_l2(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def measure() -> dict[str, dict[str, object]]:
    """Every case by the kernels; called where they are interpreted."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    for name, case in CASES.items():
        x, weight, bias = tensors(case)
        before = x.clone()
        y = group_norm_silu(x, case.groups, weight, bias, 1e-5, silu=case.silu)
        wrong = case.groups // 2 if case.groups % 2 == 0 else 1
        found[name] = {
            "distance": relative_l2(y, expected(case)),
            "of other groups": relative_l2(y, expected(case, groups=wrong)),
            "as given": y.dtype == x.dtype and y.stride() == x.stride() and torch.equal(x, before),
        }
    return found


def alone(code: str, cache: Path, **variables: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    code = "import json; from tests.kernels.test_group_norm_silu import measure; print(json.dumps(measure()))"
    found: dict[str, dict[str, object]] = json.loads(
        alone(code, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")
    )
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_group_norm_and_silu(name: str, measured: dict[str, dict[str, object]]) -> None:
    found = measured[name]
    # Of a mean far from zero float32 knows no more than 1.2e-7 of it, which are taken for deviations from it.
    lost = 2e-7 * abs(CASES[name].centre) / CASES[name].spread if CASES[name].spread else 0.0
    assert float(str(found["distance"])) <= TOLERANCES[CASES[name].dtype] + lost
    assert found["as given"], "same type and layout, and the input left alone"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.spread and case.height > 1])
def test_another_number_of_groups_is_told_apart(name: str, measured: dict[str, dict[str, object]]) -> None:
    assert float(str(measured[name]["of other groups"])) > 1e-2


def test_both_ways_are_tried() -> None:
    assert {case.launches for case in CASES.values()} == {1, 2}
    for name, case in CASES.items():
        assert (case.launches == 2) == ("two launches" in name), name
    several = CASES["joined with a skip, two launches of several tiles"]
    tile = TILE_VALUES // several.channels
    assert SPLITS * tile < several.height * several.width < 2 * SPLITS * tile, "two tiles a program, the last one less"


def test_a_sum_of_squares_would_not_do() -> None:
    """The control of the cases far from zero: E[x²] - E[x]² in float32."""
    case = CASES["far from zero"]
    x, weight, bias = tensors(case)
    grouped = x.reshape(case.batch, case.groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped * grouped).mean(2, keepdim=True) - mean * mean
    y = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    assert not relative_l2(F.silu(y), expected(case)) < 1e-3


@pytest.mark.parametrize("name", ["width 48 torch.float32", "three groups", "the norm alone", "far from zero"])
def test_the_reference_is_torch_s(name: str) -> None:
    case = CASES[name]
    x, weight, bias = tensors(case)
    found = group_norm_silu_reference(x, case.groups, weight, bias, 1e-5, silu=case.silu)
    assert found.dtype == x.dtype
    assert relative_l2(found, expected(case)) < 1e-7


@pytest.mark.parametrize(
    ("x", "groups", "message"),
    [
        (torch.zeros(1, 32, 4, 4), 16, "expected channels-last"),
        (torch.zeros(1, 32, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last), 16, "torch.float64"),
        (torch.zeros(1, 32, 4, 4).to(memory_format=torch.channels_last), 5, "32 channels in equal groups.*found 5"),
        (torch.zeros(1, 48, 4, 4).to(memory_format=torch.channels_last), 16, r"48 channels.*\[32\] and \[32\]"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(x: torch.Tensor, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(x, groups, torch.ones(32), torch.zeros(32), 1e-5)


def test_an_image_is_spread_over_so_many_programs_at_most() -> None:
    assert SPLITS & (SPLITS - 1) == 0, "each pads the others' statistics to a power of two"


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import ddsm_kernels.group_norm_silu as kernels

IMAGES = {"x": "*bf16", "y": "*bf16", "weight": "*fp32", "bias": "*fp32", "pixels": "i32", "eps": "fp32"}
SHARES = {"statistics": "*fp32", "share": "i32", "parts": "i32"}
TILED = {"GROUPS": 16, "GROUP": 7, "GROUP_LANES": 16, "LANES": 8, "TILE": 64}
SOURCES = [
    (kernels._whole_groups, {"GROUP": 7, "PIXELS": 1024, "LANES": 8, "SILU": True}),
    (kernels._partial_statistics, TILED),
    (kernels._normalise, {**TILED, "PARTS": 64, "SILU": True}),
]
for capability in (80, 90, 100):
    for kernel, constants in SOURCES:
        known = {**IMAGES, **SHARES, "channels": "i32", **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, {name: known[name] for name in kernel.arg_names}, constants)
        compiled = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 16})
        assert compiled.asm["cubin"]
        print(capability, kernel.__name__)
"""


def test_the_kernels_compile_for_an_a100_an_h100_and_a_b200(tmp_path: Path) -> None:
    compiled = alone(COMPILE, tmp_path).split("\n")
    assert len([line for line in compiled if line]) == 9


def test_a_fused_norm_moves_every_value_in_and_out_once() -> None:
    traffic = traffic_bytes((2, 48, 32, 32), torch.bfloat16)
    assert traffic.fused == 2 * (2 * 48 * 32 * 32 * 2)
    assert traffic.unfused == 6 * traffic.fused
    assert traffic_bytes((2, 48, 32, 32), torch.float32).fused == 2 * traffic.fused
