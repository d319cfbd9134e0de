"""Everything that writes, each with an oracle that knows the old state from the new one."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks import _report, swap_cost
from ddsm_engine import build, files, run
from ddsm_engine.bundle import WEIGHTS, Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.engine_cache import engines_of, read_sealed
from ddsm_export import bundling
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.supernet import load_supernet
from ddsm_export.training import cli as training
from tests.conftest import tiny_supernet
from tests.robustness.forks import expect, succeed, undisturbed


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that writes.

    Attributes:
        prepare: Makes the state before the first attempt.
        act: One attempt; it is also the next command after a kill.
        state: Names what is on disk after a kill (before any other command); raises if it is neither old nor new.
        final: Checks what the undisturbed last attempt left.
    """

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    state: Callable[[Path], str]
    final: Callable[[Path], None]


Result = TypeVar("Result")


def try_each(
    scenarios: Callable[[Path], Iterable[tuple[str, Callable[[Path], Result]]]],
) -> dict[str, Result]:
    """One trial after the other, each in a folder of its own.

    Args:
        scenarios: Given a folder to work in, names and trials.

    Raises:
        AssertionError: a trial's, with its name.
    """
    torch.set_num_threads(1)
    found: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trial in scenarios(Path(folder)):
            place = Path(tempfile.mkdtemp(dir=folder))
            try:
                found[name] = trial(place)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            shutil.rmtree(place)
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder except what is hidden."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def old_or_new(found: object, old: object, new: object) -> str:
    """Name a state, or refuse it."""
    expect(found in (old, new), f"neither old nor new: {str(found)[:300]}")
    return "old" if found == old else "new"


def one_file() -> Scenario:
    """A file that is replaced, 1 MB each."""
    old, new = b"o" * (1 << 20), b"n" * (1 << 20)
    return Scenario(
        prepare=lambda place: files.write_atomically(place / "file", old),
        act=lambda place: _replace_file(place / "file", new),
        state=lambda place: old_or_new((place / "file").read_bytes(), old, new),
        final=lambda place: expect(content(place) == {"file": new}, "the new file"),
    )


def _replace_file(path: Path, data: bytes) -> None:
    files.refuse_existing(path, force=True)
    files.write_atomically(path, data)


def one_folder(*, two_steps: bool) -> Scenario:
    """A folder that is replaced, where names can be exchanged in one step and where they cannot."""
    old, new = {f"{i}": b"old" for i in range(4)}, {f"{i}": b"new" for i in range(6)}

    def write(place: Path, wanted: dict[str, bytes]) -> None:
        if two_steps:
            files._rename_with = lambda *_: False
        files.refuse_existing(place / "folder", force=True, marker="0")
        with files.atomic_path(place / "folder") as temporary:
            temporary.mkdir()
            for name, data in wanted.items():
                (temporary / name).write_bytes(data)

    def state(place: Path) -> str:
        if two_steps and not (place / "folder").exists():
            files.clear_leftovers(place)  # what the next command does first
            return "put back: " + old_or_new(content(place / "folder"), old, new)
        return old_or_new(content(place / "folder"), old, new)

    return Scenario(
        prepare=lambda place: write(place, old),
        act=lambda place: write(place, new),
        state=state,
        final=lambda place: expect(content(place / "folder") == new, "the new folder"),
    )


class Commands:
    """The real commands, on a small bundle and a small network."""

    def __init__(self, bundle: Path, work: Path) -> None:
        self.bundle, self.work = bundle, work
        self.draw = [
            "--bundle", str(bundle), "--strategy", "coarse", "--sampler", "ddim", "--steps", "4",
            "--backend", "onnxruntime", "--threads", "1", "--batch-size", "2",
        ]  # fmt: skip

    def run_folder(self) -> Scenario:
        """A folder of images, resumed after every kill."""
        command = [*self.draw, "--num-images", "12", "--resume"]
        whole = self.work / "whole"
        undisturbed(lambda: succeed(run.main([*command, "-o", str(whole)])))
        expected = content(whole)
        expect(len(expected) == 13, "twelve images and run.json")

        def state(place: Path) -> str:
            found = content(place / "images") if (place / "images").exists() else {}
            expect(all(expected[name] == data for name, data in found.items()), "an image that is not the right one")
            expect(not found or "run.json" in found, "images without run.json")
            return "no folder yet" if not found else "some images" if len(found) < 13 else "all images"

        return Scenario(
            prepare=lambda place: None,
            act=lambda place: succeed(run.main([*command, "-o", str(place / "images")])),
            state=state,
            final=lambda place: expect(content(place / "images") == expected, "the images of an undisturbed run"),
        )

    def run_new(self) -> Scenario:
        """A folder of images that must not be there yet."""
        command = [*self.draw, "--num-images", "6"]
        whole = self.work / "new"
        undisturbed(lambda: succeed(run.main([*command, "-o", str(whole)])))
        expected = content(whole)
        return Scenario(
            prepare=lambda place: None,
            act=lambda place: succeed(run.main([*command, "-o", str(place / "images")])),
            state=lambda place: "new",
            final=lambda place: expect(content(place / "images") == expected, "the images of an undisturbed run"),
        )

    def run_over(self, name: str) -> Scenario:
        """An output that is replaced: a grid, an array, a folder."""
        command = [*self.draw, "--num-images", "4", "--force"]

        def draw(place: Path, seed: int) -> None:
            succeed(run.main([*command, "--seed", str(seed), "-o", str(place / name)]))

        reference: list[dict[str, bytes]] = []
        for seed in (0, 1):
            place = self.work / f"{name}-{seed}"
            place.mkdir()
            undisturbed(lambda place=place, seed=seed: draw(place, seed))  # type: ignore[misc]
            reference.append(content(place))
        old, new = reference
        return Scenario(
            prepare=lambda place: draw(place, 0),
            act=lambda place: draw(place, 1),
            state=lambda place: old_or_new(content(place), old, new),
            final=lambda place: expect(content(place) == new, "the new output"),
        )

    def copied_onnx(self, network: Any, artefact: Path, **_: object) -> None:
        """Instead of the conversion (seconds a width): what it gave when the bundle was made."""
        shutil.copyfile(self.bundle / f"variants/w{network.width:03d}/model.onnx", artefact)

    def export(self, *, force: bool = True) -> Scenario:
        """A bundle, compared with its network and all; with ``force`` it replaces one."""

        def export(place: Path, which: str) -> None:
            vars(bundling)["onnx_from_subnetwork"] = self.copied_onnx
            supernet = replace(tiny_supernet(), provenance={"which": which})
            options = ExportOptions(widths=(8, 32))
            succeed(guarded(lambda: export_bundle(supernet, place / "x.bundle", options, force=force)))

        def state(place: Path) -> str:
            bundle = Bundle.open(place / "x.bundle")
            bundle.verify()
            return old_or_new(bundle.manifest.provenance["supernet"]["which"], "old", "new")

        return Scenario(
            prepare=lambda place: export(place, "old") if force else None,
            act=lambda place: export(place, "new"),
            state=state,
            final=lambda place: expect(state(place) == "new", "the new bundle"),
        )

    def train(self) -> Scenario:
        """A training that is resumed after every kill, and ends with the weights of an undisturbed one."""
        data = self.work / "data.npz"
        np.savez(data, images=np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8))
        command = [
            str(data), "--image-size", "8", "--channels", "1", "--base-channels", "8", "--channel-mults", "1",
            "--attention-levels", "", "--groups", "2", "--num-res-blocks", "1", "--conv-multiple", "2",
            "--linear-multiple", "2", "--timesteps", "50", "--batch-size", "4", "--warmup-steps", "2", "--precision",
            "fp32", "--save-every", "0", "--images", "40", "--samples-every", "1000000",
        ]  # fmt: skip
        whole = self.work / "training"
        undisturbed(lambda: succeed(training.main([*command, "-o", str(whole)])))
        expected = load_supernet(whole / "supernet.safetensors")

        def state(place: Path) -> str:
            out = place / "training"
            if (out / "supernet.safetensors").exists():
                return f"a supernet of {load_supernet(out / 'supernet.safetensors').provenance['steps']:2} steps"
            return "no supernet yet"

        def final(place: Path) -> None:
            found = load_supernet(place / "training/supernet.safetensors")
            expect(found.provenance == expected.provenance, f"{found.provenance} is not {expected.provenance}")
            same = all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
            expect(same, "the undisturbed weights")
            steps = [json.loads(line)["step"] for line in (place / "training/log.jsonl").read_text().splitlines()]
            expect(steps == sorted(set(steps)), f"each step once in the log: {steps}")

        return Scenario(
            prepare=lambda place: None,
            act=lambda place: succeed(training.main([*command, "-o", str(place / "training")])),
            state=state,
            final=final,
        )

    def build(self) -> Scenario:
        """Engines of a bundle, some built before the kill."""

        def act(place: Path) -> None:
            # A copy of the key, too: it may be killed while it is made.
            os.environ["XDG_CACHE_HOME"] = str(place / "cache")
            succeed(build.main([str(place / "x.bundle"), "--batch-size", "1", "--threads", "1"]))

        def state(place: Path) -> str:
            os.environ["XDG_CACHE_HOME"] = str(place / "cache")
            whole = [read_sealed(folder) for folder in engines_of(Bundle.open(place / "x.bundle"))]
            return f"{len(whole)} engines"

        def prepare(place: Path) -> None:
            vars(bundling)["onnx_from_subnetwork"] = self.copied_onnx
            supernet = load_supernet(self.bundle / WEIGHTS)
            export_bundle(supernet, place / "x.bundle", ExportOptions(widths=(8, 16)))

        return Scenario(prepare, act, state, lambda place: expect(state(place) == "2 engines", "both engines"))

    def bench(self) -> Scenario:
        """A benchmark's result that is written again."""
        record: dict[str, Any] = json.loads(max(_report.RESULTS.glob("*-swap_cost.json")).read_text())

        def save(place: Path, date: str) -> None:
            changed = record | {"environment": record["environment"] | {"date": date}}
            swap_cost.BENCHMARK.save(changed, place / "result.json")

        def state(place: Path) -> str:
            date = json.loads((place / "result.json").read_text())["environment"]["date"]
            return old_or_new(date, "old", "new")

        return Scenario(
            prepare=lambda place: save(place, "old"),
            act=lambda place: save(place, "new"),
            state=state,
            final=lambda place: expect(state(place) == "new", "the new result"),
        )
