"""The umbrella command ``ddsm``, and what every command shares: one line and exit 1 for a refusal."""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version

from ddsm_engine.errors import BackendError, DdsmError

GROUP = "ddsm.verbs"

EXTRAS = {
    "torch": "export",
    "onnx": "export",
    "onnxscript": "export",
    "matplotlib": "export",
    "diffusers": "diffusers",
    "scipy": "search",
    "pymoo": "search",
    "pycuda": "gpu",
    "cuda": "gpu",
    "tensorrt": "gpu",
    "openvino": "cpu",
    "onnxruntime": "cpu",
}
"""Library → the extra that installs it."""

MOST_WORDS = 990
"""Characters of a refusal."""


def guarded(command: Callable[[], None]) -> int:
    """Run a command; turn a refusal into one line on stderr and 1. Anything else is a bug and keeps its traceback."""
    try:
        command()
    except (DdsmError, OSError, MemoryError) as error:
        return refuse(" ".join(str(error).split()) or type(error).__name__)
    except KeyboardInterrupt:
        return refuse("interrupted; what was finished is kept")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        return refuse(f"{library} is not installed: pip install 'ddsm-engine[{EXTRAS[library]}]'")
    return 0


def batch_sizes(text: str) -> tuple[int, ...]:
    """Read ``1,8,16``; each counts once.

    Raises:
        BackendError: not positive whole numbers.
    """
    try:
        sizes = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise BackendError(f"expected whole numbers of at least 1, separated by commas, found --batch-size {text[:60]}")
    return sizes


def refuse(message: str) -> int:
    """Print one line on stderr; returns the exit code."""
    # Messages quote what they found, and a library's own words: neither may flood a terminal.
    print(f"error: {message if len(message) <= MOST_WORDS else message[: MOST_WORDS - 1] + '…'}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """``ddsm VERB …``: find the verb among the installed ones and hand over."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = {entry.name: entry for entry in entry_points(group=GROUP)}
    if arguments[:1] == ["--version"]:
        print(version("ddsm-engine"))
        return 0
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: ddsm VERB …\n\nverbs: {', '.join(sorted(verbs))}\n\nddsm VERB --help explains one.")
        return 0 if arguments else 2
    verb = verbs.get(arguments[0])
    if verb is None:
        print(f"ddsm: unknown verb {arguments[0]!r}; expected one of: {', '.join(sorted(verbs))}", file=sys.stderr)
        return 2
    loaded: list[Callable[[Sequence[str]], int]] = []
    code = guarded(lambda: loaded.append(verb.load()))
    return code or loaded[0](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
