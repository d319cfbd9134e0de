"""The first command of the README; in a file of its own, for two processes to share the longest tests."""

import re
import sys
from pathlib import Path

from ddsm_export.demo import DEFAULT
from tests.test_readme import run


def test_the_demo_writes_what_the_readme_says(tmp_path: Path) -> None:
    # `ddsm demo` with few images: what they look like and take is not looked at here.
    few = "import sys; from ddsm_engine import cli; from ddsm_export import demo; demo.BATCH = 2; sys.exit(cli.main())"
    out = run([sys.executable, "-c", few, "demo"], tmp_path)
    written = {file.name for file in (tmp_path / "demo").iterdir()}
    assert written == {
        "fashion-mnist.bundle", "full.png", "coarse.png", f"{DEFAULT}.png", "latency.png", "trace.json",
    }  # fmt: skip
    rows = re.findall(r"^ +(\d)/8 +([\d.]+) +([\d.]+) +([\d.]+)x +([\d.]+)x$", out, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list("2345678")
    assert float(rows[-1][3]) == float(rows[-1][4]) == 1.0, "the full width against itself"
    assert re.search(r"R = [\d.]+ \(full width at \d+ % of", out)
    assert len(re.findall(r"images per second: [\d.]+ full width, [\d.]+ strategy", out)) == 2
    assert re.search(rf"^{DEFAULT}: .*; 50 calls, \d+ swaps$", out, flags=re.MULTILINE)
    assert re.search(r"Fréchet distance on classifier features, \d+ images: .* against the full width", out)
    assert DEFAULT in {file.stem for file in (tmp_path / "demo" / "fashion-mnist.bundle" / "strategies").iterdir()}
    assert "ddsm-export ckpt.pt -o my.bundle" in out
