"""PyTorch as written: the reference every other backend is compared with, cut from the bundle's own weights."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from ddsm_engine.backends.engine import Arrays, EngineOptions, describe_target, fp32_alone
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.networks.slicing import empty_unet, subnetwork
from ddsm_engine.networks.unet import UNet
from ddsm_engine.spec import UNetSpec
from ddsm_engine.untrusted import open_safetensors, shapes_of


def network_from_weights(weights: Path, spec: UNetSpec, width: int) -> UNet:
    """Cut one sub-network from a bundle's weights.

    Raises:
        BackendError: the file cannot be read, or holds other weights than the supernet's.
    """
    full = empty_unet(spec, spec.base_channels).named_parameters()
    expected = {name: tuple(parameter.shape) for name, parameter in full}
    try:
        with open_safetensors(weights, "pt") as opened:
            found = shapes_of(opened)
            if not expected.items() <= found.items():
                raise BackendError(f"{weights} does not hold the weights of this supernet; export the bundle again")
            return subnetwork(spec, {name: opened.get_tensor(name).float() for name in expected}, width)
    except (SafetensorError, RuntimeError) as error:
        raise BackendError(f"{weights} cannot be read as this supernet's weights: {error}") from error


def cut_network(bundle: Bundle, variant: Variant) -> UNet:
    """The network of a variant, from the weights that its bundle holds.

    Raises:
        BundleError: the weights are damaged.
        BackendError: see ``network_from_weights``.
    """
    return network_from_weights(bundle.weights(variant), bundle.spec(variant), variant.width)


def resolve_precision(options: EngineOptions) -> str:
    """What an engine with these options computes in.

    Raises:
        BackendError: the precision is not there.
    """
    return fp32_alone(
        options,
        f"the torch backend is the fp32 reference on a CPU, found --precision {options.precision}; use --backend "
        f"openvino for bf16",
    )


def target(options: EngineOptions, batch: int) -> Target:
    """What an engine with these options depends on beside the model."""
    return describe_target("torch", str(torch.__version__), resolve_precision(options), options, batch)


class TorchEngine:
    """One static sub-network on the CPU, eager, in fp32; ``torch_cuda`` has the one for a GPU."""

    def __init__(self, network: UNet, options: EngineOptions) -> None:
        """Take over a sub-network.

        Raises:
            BackendError: the precision is not there.
        """
        self.precision = resolve_precision(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        self._network = network
        self._inputs: list[torch.Tensor] = []
        self._output = torch.empty(0)

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        """Use these arrays from now on."""
        self._inputs = [torch.from_numpy(inputs[name]) for name in ("sample", "time_features")]
        self._output = torch.from_numpy(outputs["out_sample"])

    def run(self) -> None:
        """One forward pass."""
        with torch.inference_mode():
            self._output.copy_(self._network(*self._inputs))

    def close(self) -> None:
        """Release the weights."""
        self._inputs.clear()
        del self._network
