"""Every tolerance of the suite and its reason; all are relative L2 on outputs of order one."""

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
}
"""One forward pass of a variant in fp32, by backend."""

FP16_FORWARD: Final = 1e-2
"""fp16 rounds every activation to 11 bits some fifty times in a row (observed 4e-4 to 3e-3)."""

TRAJECTORY: Final = 2e-5
"""Up to 1000 fp32 steps with the damped denoiser, running freely: rounding adds up (observed below 5e-6)."""
