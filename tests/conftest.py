"""One small supernet and one small bundle serve the whole suite."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ddsm_engine.backends.native import library
from ddsm_engine.bundle import Bundle
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.strategy import Strategy
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.demo import COARSE
from ddsm_export.supernet import Supernet
from tests.oracle.dynamic_unet import TABLE, Config, published_state_dict
from tests.oracle.names import product_spec, product_weights

CONFIG = Config(
    ch=32,
    ch_mult=(1, 2),
    attn=(1,),
    num_res_blocks=1,
    groups=4,
    conv_multiple=4,
    linear_multiple=4,
    T=1000,
    in_channels=3,
)
TINY = product_spec(CONFIG, image_size=8)
STATE = published_state_dict(CONFIG, seed=0)
"""Random weights, biases and norm affines: at default initialisation every wrong variant passes."""


def tiny_supernet() -> Supernet:
    return Supernet(TINY, NoiseSchedule(1e-4, 0.02, 1000), product_weights(STATE), {"source": "random"}, STATE[TABLE])


def export_tiny(path: Path) -> None:
    """All seven widths and a strategy, under a minute."""
    strategies = {"coarse": Strategy.coarse(COARSE, TINY.timesteps)}
    export_bundle(tiny_supernet(), path, ExportOptions(), strategies=strategies)


LONGEST_FIRST = ("test_readme.py", "test_kills.py", "test_demo.py", "test_corpus.py", "test_races.py")
"""Files that take a minute or more: begun last, the longest would keep one of two processes waiting for the other."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the order is otherwise kept."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def supernet() -> Supernet:
    return tiny_supernet()


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Processes that share the tests' work share the bundle: the first one makes it, the others wait.
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    lock = os.open(shared, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if not (shared / "tiny.bundle").exists():
            export_tiny(shared / "tiny.bundle")
    finally:
        os.close(lock)
    return shared / "tiny.bundle"


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The networks are tiny, and a second thread only waits when the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder, and the key in it, are the user's.

    Engines lie there by their bundle's content, and most tests' bundles are copies of one: a test that keeps engines
    there would leave them to all others, so it takes a folder of its own.
    """
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield
    assert not list(cache.glob("ddsm-engine/engines/*/*")), "a test left engines in the folder that all tests share"


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A C++ compiler that is there and fails, and no kernels of before."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()


Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command that must be refused: exit 1 and exactly one line on stderr, which is returned."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("leaving out")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
