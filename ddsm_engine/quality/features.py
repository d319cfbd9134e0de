"""Features of images by a network in a file: ONNX by ONNX Runtime or OpenVINO, anything else as TorchScript.

An ONNX file is scanned before it is opened, as a bundle's are. A TorchScript file is a program: take none from somebody
whom you would not take a program from.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends import INSTALL
from ddsm_engine.errors import BackendError, BundleError, MetricError
from ddsm_engine.files import sha256_of
from ddsm_engine.onnx_file import check_onnx
from ddsm_engine.quality.inception import inception_input
from ddsm_engine.quality.metric import Identity, Images, Rows
from ddsm_engine.untrusted import one_line

BATCH: Final = 64
MAX_FEATURES: Final = 4096
"""Of a network; a covariance of these takes 128 MiB. Inception has 2048."""

Network = Callable[[Images], NDArray[np.generic]]

AS_THEY_ARE: Final = "none"
PYTORCH_FID: Final = "pytorch-fid"
PREPARATIONS: Final[dict[str, Callable[[Images], Images]]] = {
    AS_THEY_ARE: lambda images: images,
    PYTORCH_FID: inception_input,
}
"""What a network is shown of images [N, C, H, W] in [-1, 1], by the name that stands in identities."""


class _NetworkError(Exception):
    """A network that does not open or does not run, in its library's words."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The features of a network.

    Attributes:
        label: ``classifier features``, or the file's name with that word.
        sha256: Of the network's file.
        preparation: What the network is shown, see ``PREPARATIONS``.
        path: The network's file.
        network: From what it is shown to what it answers.
    """

    label: str
    sha256: str
    preparation: str
    path: Path
    network: Network

    @classmethod
    def open(
        cls, path: Path, shape: tuple[int, int, int], *, label: str = "", preparation: str = AS_THEY_ARE
    ) -> "Features":
        """Open a network, and ask it once for the features of two images of this shape [C, H, W].

        Raises:
            MetricError: a file that is no network, or that does not take such images or gives no features of them.
            BackendError: no library is installed that opens it.
        """
        if not path.is_file():
            raise MetricError(f"{path} is no file; expected a feature network as ONNX or TorchScript")
        try:
            network = _open_onnx(path) if path.suffix == ".onnx" else _open_torchscript(path)
        except _NetworkError as error:
            raise MetricError(f"{path} cannot be opened as a feature network: {error}") from error
        opened = cls(label or f"{path.name} features", sha256_of(path), preparation, path, network)
        opened(np.zeros((2, *shape), np.float32))
        return opened

    @property
    def identity(self) -> Identity:
        """See ``Description``."""
        return identity_of(self.sha256, self.preparation)

    def __call__(self, images: Images) -> Rows:
        """Features [N, F] of images [N, C, H, W].

        Raises:
            MetricError: the network does not take such images, or answers something else than rows of finite numbers.
        """
        return np.concatenate([self._of(images[first : first + BATCH]) for first in range(0, len(images), BATCH)])

    def _of(self, images: Images) -> Rows:
        try:
            found = self.network(np.ascontiguousarray(PREPARATIONS[self.preparation](images)))
        except _NetworkError as error:
            raise MetricError(f"{self.path} does not take images {list(images.shape)}: {error}") from error
        rows = found.reshape(found.shape[:2]) if found.ndim == 4 and found.shape[2:] == (1, 1) else found
        if rows.ndim != 2 or len(rows) != len(images) or not 1 <= rows.shape[1] <= MAX_FEATURES:
            raise MetricError(
                f"{self.path} must answer {len(images)} images with features [{len(images)}, at most {MAX_FEATURES}], "
                f"found shape {str(list(found.shape))[:60]}"
            )
        if rows.dtype not in (np.float32, np.float16, np.float64) or not np.isfinite(rows).all():
            raise MetricError(
                f"{self.path} answers with {rows.dtype} that are not all finite numbers; expected features"
            )
        return np.asarray(rows, np.float32)


def identity_of(sha256: str, preparation: str = AS_THEY_ARE) -> Identity:
    """The identity of the features of a network file of this SHA-256."""
    return {"description": "features", "network": sha256, "preparation": preparation}


def _open_onnx(path: Path) -> Network:
    try:
        check_onnx(path)
    except BundleError as error:
        # It is no bundle's file, and the advice to export that again would mislead.
        raise _NetworkError(str(error).partition(";")[0]) from error
    if importlib.util.find_spec("onnxruntime") is not None:
        return _open_onnxruntime(path)
    if importlib.util.find_spec("openvino") is not None:
        return _open_openvino(path)
    raise BackendError(f"an ONNX feature network needs ONNX Runtime or OpenVINO: {INSTALL['onnxruntime']}")


def _open_onnxruntime(path: Path) -> Network:
    from ddsm_engine.backends.onnxruntime import LOAD_ERRORS  # before the library itself, which it keeps silent

    import onnxruntime as ort  # isort: skip

    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.log_severity_level = 4
    try:
        session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except LOAD_ERRORS as error:
        raise _NetworkError(one_line(error)) from error
    inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    if len(inputs) != 1 or not outputs:
        raise _NetworkError(f"it has {len(inputs)} inputs and {len(outputs)} outputs, expected one input")

    def run(images: Images) -> NDArray[np.generic]:
        try:
            return np.asarray(session.run(outputs[:1], {inputs[0]: images})[0])
        except (*LOAD_ERRORS, RuntimeError) as error:
            raise _NetworkError(one_line(error)) from error

    return run


def _open_openvino(path: Path) -> Network:
    from ddsm_engine.backends.openvino import core

    try:
        compiled = core().compile_model(core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except (RuntimeError, UnicodeDecodeError) as error:
        raise _NetworkError(one_line(error)) from error
    if len(compiled.inputs) != 1 or not compiled.outputs:
        raise _NetworkError(f"it has {len(compiled.inputs)} inputs, expected one")

    def run(images: Images) -> NDArray[np.generic]:
        try:
            return np.array(compiled(images)[compiled.outputs[0]])
        except RuntimeError as error:
            raise _NetworkError(one_line(error)) from error

    return run


def _open_torchscript(path: Path) -> Network:
    import torch

    try:
        network = torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, torch.jit.Error) as error:
        raise _NetworkError(f"it is neither .onnx nor TorchScript ({one_line(error)})") from error

    def run(images: Images) -> NDArray[np.generic]:
        try:
            with torch.inference_mode():
                found = network(torch.tensor(images))
        except (RuntimeError, ValueError, torch.jit.Error) as error:
            raise _NetworkError(one_line(error)) from error
        if not isinstance(found, torch.Tensor):
            raise _NetworkError(f"it answers with {type(found).__name__}, expected one tensor")
        return np.asarray(found.float().numpy())

    return run
