"""The first command of the README; in a file of its own, for two processes to share the longest tests."""

import re
from pathlib import Path

from tests.test_readme import run


def test_the_demo_writes_what_the_readme_says(tmp_path: Path) -> None:
    out = run("ddsm demo", tmp_path)
    written = {file.name for file in (tmp_path / "demo").iterdir()}
    assert written == {"fashion-mnist.bundle", "full.png", "coarse.png", "latency.png", "trace.json"}
    rows = re.findall(r"^ +(\d)/8 +([\d.]+) +([\d.]+) +([\d.]+)x +([\d.]+)x$", out, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list("2345678")
    assert float(rows[-1][3]) == float(rows[-1][4]) == 1.0, "the full width against itself"
    assert re.search(r"R = [\d.]+ \(full width at \d+ % of", out)
    assert re.search(r"images per second: [\d.]+ full width, [\d.]+ strategy", out)
    assert "ddsm-export ckpt.pt -o my.bundle" in out
