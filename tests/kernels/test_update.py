"""The kernel's own source, compiled for the processor, against the plain reference and the run time's noise."""

import ctypes
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddsm_engine.noise import SeededNoise
from ddsm_kernels import update
from tests.gpu.fake import FakeDevice, update_kernel

# One thread that is every thread in turn; products and sums are rounded one by one unless the compiler fuses them.
PRELUDE = """
#include <cmath>
#include <cstdint>
#define __global__
#define __device__
using std::isfinite;
struct Index { unsigned x; };
static Index blockIdx = {0}, threadIdx = {0}, blockDim = {1}, gridDim = {1};
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static unsigned atomicAdd(unsigned *at, unsigned by) { unsigned before = *at; *at += by; return before; }
static int atomicMin(int *at, int value) { int before = *at; if (value < before) *at = value; return before; }
static void __threadfence() {}
static void __threadfence_system() {}
static void __syncthreads() {}
static unsigned long long ticks = 0;
static unsigned long long now() { return ++ticks; }
extern "C" void (*set_condition)(unsigned long long, unsigned);
void (*set_condition)(unsigned long long, unsigned) = nullptr;
extern "C" void cudaGraphSetConditional(unsigned long long handle, unsigned value) { set_condition(handle, value); }
"""
EPILOGUE = """
extern "C" void launch(const Run *run, unsigned blocks, unsigned threads) {
    gridDim.x = blocks; blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (int thread = (int)threads - 1; thread >= 0; --thread) { threadIdx.x = (unsigned)thread; ddsm_update(run); }
}
extern "C" void noise_words(u64 seed, u32 block, u32 call, u32 image, u32 stream, float *out) {
    normals(seed, block, call, image, stream, out);
}
extern "C" unsigned size_of_run() { return sizeof(Run); }
extern "C" unsigned size_of_row() { return sizeof(Row); }
"""
SET_CONDITION = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint32)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("update")
    (folder / "update.cpp").write_text(PRELUDE + update.source(with_loop=True) + EPILOGUE)
    subprocess.run(
        [
            compiler,
            "-O2",
            "-ffp-contract=off",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-o",
            "update.so",
            "update.cpp",
        ],
        cwd=folder,
        check=True,
    )
    return ctypes.CDLL(str(folder / "update.so"))


def compiled_kernel(library: ctypes.CDLL, blocks: int = 2, threads: int = 3) -> Any:
    def kernel(device: FakeDevice, argument: int) -> None:
        set_condition = SET_CONDITION(device.conditions.__setitem__)
        ctypes.c_void_p.in_dll(library, "set_condition").value = ctypes.cast(set_condition, ctypes.c_void_p).value
        library.launch(ctypes.c_void_p(argument), blocks, threads)

    return kernel


def test_the_tables_have_the_layout_that_the_kernel_reads(library: ctypes.CDLL) -> None:
    assert library.size_of_run() == update.RUN.itemsize
    assert library.size_of_row() == update.ROW.itemsize


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 17, 2**64 - 1])
@pytest.mark.parametrize(("call", "image", "stream"), [(0, 0, 0), (999, 12345, 1), (2**31, 2**32 - 1, 1)])
def test_the_noise_is_that_of_the_host_to_float_rounding(
    library: ctypes.CDLL, seed: int, call: int, image: int, stream: int
) -> None:
    drawn = np.empty((1, 4 * 50), np.float32)
    for block in range(50):
        pointer = drawn[0, 4 * block :].ctypes.data_as(ctypes.c_void_p)
        library.noise_words(ctypes.c_uint64(seed), block, call, image, stream, pointer)
    on_host = np.empty((1, 4, 10, 5), np.float32)
    SeededNoise(seed, image).fill(on_host, stream, call)
    assert np.abs(drawn - on_host.reshape(1, -1)).max() < 2e-6, "normals reach 6, an angle 6.3; each is rounded"


@pytest.mark.parametrize("slots", [1, 2, 4, update.MAX_SLOTS])
@pytest.mark.parametrize("bound", [None, 0.6])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (3, 5), (40, 7)])
def test_the_kernel_computes_the_reference(
    library: ctypes.CDLL, slots: int, bound: float | None, blocks: int, threads: int
) -> None:
    images, elements, calls = 3, 30, 4
    rng = np.random.default_rng(slots)
    coefficients = rng.standard_normal((calls + 1, slots, slots + 3)).astype(np.float32)
    coefficients[rng.random(coefficients.shape) < 0.3] = 0
    coefficients[2, slots - 1] = 0  # a slot that is not read again
    coefficients[:, 0, 0] = 1
    if bound is None:
        coefficients[:, :, -2] = 0
    results: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]] = []
    for kernel in (update_kernel, compiled_kernel(library, blocks, threads)):
        device = FakeDevice(kernels={update.KERNEL: kernel})
        rng = np.random.default_rng(7)
        rows = np.zeros(calls + 1, update.ROW)
        rows["call"], rows["stream"] = np.arange(calls + 1) + 5, [0, 1, 1, 1, 1]
        rows["has_noise"] = coefficients[:, :, -1].any(axis=1)
        rows["features"], rows["feature_offset"] = [0, 3, 5, 3, 5], [0, 0, 3, 8, 11]
        rows["to_x_0"] = rng.standard_normal((calls + 1, 2))
        tables: dict[str, NDArray[Any]] = {
            "slots": rng.standard_normal((slots, images, elements)).astype(np.float32),
            "output": rng.standard_normal((images, elements)).astype(np.float32),
            "features": np.zeros((images, 5), np.float32),
            "rows": rows,
            "coefficients": coefficients,
            "feature_rows": rng.standard_normal(16).astype(np.float32),
            "state": np.array([(0, 0, update.NOTHING_BAD, 0)], update.STATE),
            "clock": np.zeros(calls + 1, np.uint64),
        }
        run = np.zeros(1, update.RUN)
        for name, table in tables.items():
            run[name] = device.allocate(table.nbytes)
            device.upload(int(run[name][0]), table)
        flags, address = device.shared(2)
        run["progress"], run["stop"] = address, address + 4
        run["seed"], run["first_image"], run["images"], run["elements"] = 2**40 + 3, 11, images, elements
        run["slot_count"], run["calls"] = slots, calls
        if bound is not None:
            run["is_bounded"], run["bound"] = 1, bound
        argument = device.allocate(run.nbytes)
        device.upload(argument, run)
        features = []
        with device.current():
            for call in range(calls + 1):
                device.launch(update.source(with_loop=False), update.KERNEL, blocks, threads, argument)
                device.download(tables["features"], int(run["features"][0]))
                features.append(tables["features"].copy())
                assert flags[0] == call
        for name in ("slots", "state", "clock"):
            device.download(tables[name], int(run[name][0]))
        assert (np.diff(tables["clock"].astype(np.int64)) >= 0).all()
        results.append((np.asarray(tables["slots"], np.float32), np.stack(features), tables["state"]))
    plain, compiled = results
    scale = np.abs(plain[0]).max()
    assert np.abs(compiled[0] - plain[0]).max() < 2e-6 * scale, "the normals differ by their rounding"
    assert compiled[1].tobytes() == plain[1].tobytes()
    assert compiled[2].tobytes() == plain[2].tobytes()


def test_without_noise_the_bits_are_those_of_the_reference_interpreter(library: ctypes.CDLL) -> None:
    from ddsm_engine.device_scheduler import EXECUTIONS
    from tests.gpu.test_device_scheduler import expected, make_plan, scheduler_on

    plan = make_plan("unipc", 9, clip_sample=0.8)
    device = FakeDevice(kernels={update.KERNEL: compiled_kernel(library)})
    for execution in EXECUTIONS:
        scheduler = scheduler_on(device)
        scheduler.run(plan, SeededNoise(3), execution=execution)
        reached, wanted = scheduler.x, expected(plan, SeededNoise(3))
        assert np.abs(reached - wanted).max() < 1e-5 * np.abs(wanted).max(), "the initial normals differ by rounding"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_marked(library: ctypes.CDLL, value: float) -> None:
    from ddsm_engine.errors import BackendError
    from tests.gpu.fake import FakeEngine
    from tests.gpu.test_device_scheduler import FEATURES, SHAPE, make_plan, scheduler_on

    device = FakeDevice(kernels={update.KERNEL: compiled_kernel(library)})
    scheduler = scheduler_on(device)

    def breaks(sample: Any, features: Any) -> Any:
        return np.where(sample.any(), np.float32(value), np.float32(0)) * np.ones_like(sample)

    scheduler.add("expert", FakeEngine(device, breaks, SHAPE, FEATURES["expert"]), FEATURES["expert"])
    with np.errstate(invalid="ignore"), pytest.raises(BackendError, match=r"call 3 .* of variant expert"):
        scheduler.run(make_plan("ddim", 6, clip_sample=1.0 if np.isnan(value) else None), SeededNoise(0))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("with_loop", [False, True])
def test_nvrtc_compiles_the_source(architecture: str, with_loop: bool) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    source = update.source(with_loop=with_loop).encode()
    error, program = nvrtc.nvrtcCreateProgram(source, b"update.cu", 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    (error,) = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])
    _, length = nvrtc.nvrtcGetProgramLogSize(program)
    said = b" " * (length + 1)  # one byte alone would be the one that all of Python shares
    nvrtc.nvrtcGetProgramLog(program, said)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, said.decode()
    assert said.strip(b" \0\n") == b"", "a warning is a defect here"
