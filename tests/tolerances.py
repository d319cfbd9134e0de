"""Every tolerance of the suite and its reason; relative L2 on outputs of order one, unless it says otherwise."""

from typing import Final

SLICED_FORWARD: Final = 1e-6
"""Static torch network against the dynamic oracle (observed: equal bits at every width)."""

FORWARD: Final = {
    # Cut and run by the same library: equal up to the blocking of a product.
    "torch": 1e-6,
    # Other order of sums in convolutions and norms (observed 7e-7 to 1.8e-6).
    "onnxruntime": 2e-6,
    # Fuses multiply and add across operators (observed 7e-7 to 2.1e-6).
    "openvino": 5e-6,
    # Winograd's transforms take differences of sums (observed 5e-7 to 1.4e-6; 3e-6 with 128 channels).
    "native": 5e-6,
}
"""One forward pass of a variant in fp32, by backend."""

FP16_FORWARD: Final = 1e-2
"""fp16 rounds every activation to 11 bits some fifty times in a row (observed 4e-4 to 3e-3)."""

TRAJECTORY: Final = 2e-5
"""Up to 1000 fp32 steps with the damped denoiser, running freely: rounding adds up (observed below 5e-6)."""

SAMPLER_DOUBLE: Final = 1e-9
"""A sampler's whole trajectory against diffusers', both in float64: the largest difference of a value, relative to the
largest value (observed up to 6.5e-11, where a third-order solver amplifies rounding; 3e-13 otherwise)."""

SAMPLER_SINGLE: Final = 1e-4
"""The same in float32, in which diffusers keeps its tables, too (observed up to 2.6e-5)."""

DIFFUSERS_IMAGES: Final = 2e-4
"""Images in [0, 1] of a whole pipeline against diffusers': at the noisy end a clean image is 157 times a difference of
near equals, which diffusers computes in float32 (observed up to 3.2e-5)."""

DIFFUSERS_FORWARD: Final = 2e-6
"""One forward of a network in torch against diffusers': sums in another order (observed 4e-7 to 8e-7)."""

DIFFUSERS_ENGINE: Final = 5e-6
"""The same of any backend's engine; the last bits of another library's exponentials come in, too (observed 2.2e-6)."""
