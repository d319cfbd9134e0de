"""The whole host side of a call in one kernel: noise, clean image and its bound, every slot, the next call's features.

A run is tables in device memory and one launch of this kernel after each call of a network; it finds its place in the
tables by a counter that it advances itself, so the same captured launch serves every call. Row 0 of the tables is the
initial sample; row i is the update that follows call i - 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

KERNEL = "ddsm_update"
THREADS = 256
MAX_SLOTS = 8
"""Slots of a sampler's state: UniPC of order 3 has four."""

ROW = np.dtype(
    [
        ("body", "u4"),
        ("stream", "u4"),
        ("call", "u4"),
        ("has_noise", "u4"),
        ("features", "u4"),
        ("feature_offset", "u4"),
        ("to_x_0", "f4", (2,)),
    ],
    align=True,
)
"""One row: which body of a loop computes the network of this call; stream and call of the noise, and whether there is
any; how many features the network reads and where they begin in the table of them; the clean image's coefficients."""

STATE = np.dtype([("next", "i4"), ("ticket", "u4"), ("first_bad", "i4"), ("unused", "i4")], align=True)
"""What the kernel keeps: the row that is due, how many blocks have finished it, the first row that left a value that is
not finite."""

NOTHING_BAD = np.iinfo(np.int32).max

RUN = np.dtype(
    [
        ("seed", "u8"),
        ("slots", "u8"),
        ("output", "u8"),
        ("features", "u8"),
        ("rows", "u8"),
        ("coefficients", "u8"),
        ("feature_rows", "u8"),
        ("state", "u8"),
        ("clock", "u8"),
        ("progress", "u8"),
        ("stop", "u8"),
        ("more", "u8"),
        ("body", "u8"),
        ("first_image", "u4"),
        ("images", "u4"),
        ("elements", "u4"),
        ("slot_count", "u4"),
        ("calls", "u4"),
        ("is_bounded", "u4"),
        ("is_loop", "u4"),
        ("bound", "f4"),
    ],
    align=True,
)
"""What the kernel's one argument points to. Addresses: ``slots`` [slot_count, images, elements], ``output`` [images,
elements], ``features`` [images, F], ``rows`` [calls + 1] of ROW, ``coefficients`` [calls + 1, slot_count, slot_count +
3], ``feature_rows``, ``state``, ``clock`` [calls + 1] of uint64 nanoseconds, ``progress`` and ``stop`` int32; the
handles of a loop's conditions."""


def reference(
    slots: Sequence[NDArray[np.float32]],
    output: NDArray[np.float32],
    noise: NDArray[np.float32],
    to_x_0: NDArray[np.float32],
    update: NDArray[np.float32],
    bound: float | None,
) -> list[NDArray[np.float32]]:
    """The slots after a call, plainly: ``update`` · (slots…, output, x_0, noise), terms added from the left.

    Args:
        slots: Each [images, elements].
        output: The network's, of that shape.
        noise: Fresh, of that shape.
        to_x_0: [2], coefficients of slot 0 and the output in the predicted clean image.
        update: [slots, slots + 3]; a row of zeros leaves its slot, which is not read again.
        bound: The clean image is clipped to ± this; None: it does not occur in ``update``.
    """
    x_0 = output if bound is None else np.clip(_sum(to_x_0, [slots[0], output], output), -bound, bound)
    terms = [*slots, output, x_0, noise]
    return [_sum(row, terms, slot) for row, slot in zip(update, slots, strict=True)]


def _sum(
    row: NDArray[np.float32], terms: Sequence[NDArray[np.float32]], otherwise: NDArray[np.float32]
) -> NDArray[np.float32]:
    products = [coefficient * term for coefficient, term in zip(row, terms, strict=True) if coefficient]
    return sum(products[1:], start=products[0]) if products else otherwise


def blocks(images: int, elements: int) -> int:
    """How many blocks of ``THREADS`` threads: one thread for four elements, which one draw of noise serves."""
    return min(-(-images * -(-elements // 4) // THREADS), 2048)


def source(*, with_loop: bool) -> str:
    """CUDA C++ of the kernel; ``with_loop`` (CUDA 12.8) can also steer the loop that it runs in."""
    return f"#define WITH_LOOP {int(with_loop)}\n#define MAX_SLOTS {MAX_SLOTS}\n{_SOURCE}"


def start_row(scale: float, slots: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Row 0: slot 0 becomes noise of stream 0 times ``scale``.

    Returns:
        [1] of ROW without features, and its coefficients [1, slots, slots + 3].
    """
    coefficients = np.zeros((1, slots, slots + 3), np.float32)
    coefficients[0, 0, -1] = scale
    row = np.zeros(1, ROW)
    row["has_noise"] = 1
    return row, coefficients


# Products and sums are rounded one by one, as numpy rounds them: a fused multiply-add would differ in the last bit.
_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

struct Row { u32 body, stream, call, has_noise, features, feature_offset; float to_x_0[2]; };
struct State { int next; u32 ticket; int first_bad, unused; };
struct Run {
    u64 seed;
    float *slots;
    const float *output;
    float *features;
    const Row *rows;
    const float *coefficients;
    const float *feature_rows;
    State *state;
    u64 *clock;
    volatile int *progress;
    const volatile int *stop;
    u64 more, body;
    u32 first_image, images, elements, slot_count, calls, is_bounded, is_loop;
    float bound;
};

#ifdef __CUDACC__
__device__ static u64 now() {
    u64 nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}
#endif
#if WITH_LOOP
extern "C" __device__ void cudaGraphSetConditional(u64 handle, u32 value);
#endif

// Philox4x32-10 (Salmon et al. 2011) and Box-Muller, as ddsm_engine.noise has them.
__device__ static void normals(u64 seed, u32 block, u32 call, u32 image, u32 stream, float out[4]) {
    u32 c0 = block, c1 = call, c2 = image, c3 = stream;
    u32 key0 = (u32)seed, key1 = (u32)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const u64 product0 = (u64)0xD2511F53u * c0, product1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(product1 >> 32) ^ c1 ^ key0;
        c1 = (u32)product1;
        c2 = (u32)(product0 >> 32) ^ c3 ^ key1;
        c3 = (u32)product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    const u32 words[4] = {c0, c1, c2, c3};
    for (int pair = 0; pair < 4; pair += 2) {
        // (word + 1/2) / 2^32 lies in (0, 1], so the logarithm is finite.
        const float uniform = __fmul_rn(__fadd_rn((float)words[pair], 0.5f), 2.3283064365386963e-10f);
        const float radius = sqrtf(__fmul_rn(logf(uniform), -2.0f));
        const float angle = __fmul_rn((float)words[pair + 1], 1.4629180792671596e-09f);
        out[pair] = __fmul_rn(radius, cosf(angle));
        out[pair + 1] = __fmul_rn(radius, sinf(angle));
    }
}

// A sum that begins with its first product; a coefficient of zero leaves its term out, whatever it holds.
struct Sum {
    float value;
    bool is_empty;
    __device__ void add(float coefficient, float term) {
        if (coefficient == 0.0f) return;
        const float product = __fmul_rn(coefficient, term);
        value = is_empty ? product : __fadd_rn(value, product);
        is_empty = false;
    }
};

extern "C" __global__ void ddsm_update(const Run *run) {
    State *state = run->state;
    const int due = *(volatile int *)&state->next;  // every block reads it before it takes its ticket
    const Row row = run->rows[due];
    const u32 slot_count = run->slot_count, columns = slot_count + 3, elements = run->elements;
    const u32 quads = (elements + 3) / 4;
    const u64 size = (u64)run->images * elements;
    const float *update = run->coefficients + (u64)due * slot_count * columns;
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, stride = (u64)gridDim.x * blockDim.x;

    for (u64 i = first; i < (u64)run->images * quads; i += stride) {
        const u32 image = (u32)(i / quads), quad = (u32)(i % quads);
        float noise[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row.has_noise) normals(run->seed, quad, row.call, run->first_image + image, row.stream, noise);
        for (u32 lane = 0; lane < 4 && 4 * quad + lane < elements; ++lane) {
            const u64 at = (u64)image * elements + 4 * quad + lane;
            float slots[MAX_SLOTS];
#pragma unroll
            for (u32 slot = 0; slot < MAX_SLOTS; ++slot)
                slots[slot] = slot < slot_count ? run->slots[slot * size + at] : 0.0f;
            const float output = run->output[at];
            float x_0 = 0.0f;
            if (run->is_bounded) {
                Sum sum = {0.0f, true};
                sum.add(row.to_x_0[0], slots[0]);
                sum.add(row.to_x_0[1], output);
                x_0 = sum.value < -run->bound ? -run->bound : sum.value > run->bound ? run->bound : sum.value;
            }
            for (u32 slot = 0; slot < slot_count; ++slot) {
                const float *coefficients = update + slot * columns;
                Sum sum = {0.0f, true};
#pragma unroll
                for (u32 other = 0; other < MAX_SLOTS; ++other)
                    if (other < slot_count) sum.add(coefficients[other], slots[other]);
                sum.add(coefficients[slot_count], output);
                sum.add(coefficients[slot_count + 1], x_0);
                sum.add(coefficients[slot_count + 2], noise[lane]);
                if (sum.is_empty) continue;
                run->slots[slot * size + at] = sum.value;
                if (slot == 0 && !isfinite(sum.value)) atomicMin(&state->first_bad, due);
            }
        }
    }

    if (due < (int)run->calls) {
        const Row next = run->rows[due + 1];
        for (u64 i = first; i < (u64)run->images * next.features; i += stride)
            run->features[i] = run->feature_rows[next.feature_offset + i % next.features];
    }

    __threadfence();
    __syncthreads();
    if (threadIdx.x != 0 || atomicAdd(&state->ticket, 1u) != gridDim.x - 1) return;
    // The last block: all others have read what it now changes.
    state->ticket = 0;
    state->next = due + 1;
    run->clock[due] = now();
    *run->progress = due;
    __threadfence_system();
#if WITH_LOOP
    if (run->is_loop) {
        const bool is_on = due < (int)run->calls && !*run->stop;
        cudaGraphSetConditional(run->more, is_on);
        cudaGraphSetConditional(run->body, is_on ? run->rows[due + 1].body : 0xFFFFFFFFu);  // which is no body
    }
#endif
}
"""
