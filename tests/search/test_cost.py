"""Is a run priced by what was measured here, swaps included, or by what was counted?"""

import re
from pathlib import Path

import pytest

from ddsm_engine.backends import artefact_backends
from ddsm_engine.cost import gflops
from ddsm_engine.errors import BundleError
from ddsm_engine.search.cost import counted_cost, measured_cost
from tests.search.measured import BATCH, MS, OPTIONS, copy_bundle, keep_table


def test_a_run_costs_its_calls_and_what_each_swap_adds(bundle_path: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    keep_table(bundle)
    cost = measured_cost(bundle, "onnxruntime", OPTIONS, BATCH)
    assert (cost.unit, cost.target and cost.target["backend"]) == ("ms", "onnxruntime")
    # Per image: a call of a batch of 4 takes a quarter a piece.
    assert cost.of(["w032"] * 3) == pytest.approx(18)
    assert cost.of(["w032", "w016", "w016", "w032"]) == pytest.approx(6 + 2 + 2 + 6 + 0.1 + 0.3)
    assert cost.of(["w032", "w008"]) == pytest.approx(7), "a swap that seemed to save time is taken for noise"


def test_counted_gflops_are_true_ones_and_swaps_are_free(bundle_path: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    cost = counted_cost(bundle)
    assert (cost.unit, cost.target) == ("GFLOPs", None)
    assert cost.of(["w032", "w016"]) == pytest.approx(
        gflops(bundle.variants["w032"].macs) + gflops(bundle.variants["w016"].macs)
    )


def test_auto_is_the_backend_that_the_run_would_take(bundle_path: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    for backend in artefact_backends():
        keep_table(bundle, backend, ms=MS if backend == "onnxruntime" else dict.fromkeys(MS, 9.0))
    narrow, wide = (measured_cost(bundle, "auto", OPTIONS, BATCH, [variant]) for variant in ("w008", "w032"))
    assert [cost.target and cost.target["backend"] for cost in (narrow, wide)] == ["onnxruntime", "openvino"]


def test_a_bundle_that_was_not_measured_is_answered_with_the_command(bundle_path: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    with pytest.raises(BundleError, match=re.escape(f"ddsm bench {bundle.path} --backend openvino")) as refused:
        measured_cost(bundle, "auto", OPTIONS, BATCH)
    assert str(refused.value).endswith(f"--batch-size {BATCH} --save")


def test_a_table_from_another_machine_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    keep_table(bundle, processor="Another CPU @ 3 GHz")
    with pytest.raises(BundleError, match=r"measured on Another CPU @ 3 GHz, this machine is .*ddsm bench .*--save"):
        measured_cost(bundle, "onnxruntime", OPTIONS, BATCH)
