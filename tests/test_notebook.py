"""The notebook runs from top to bottom, and it keeps what it printed."""

import json
import subprocess
import sys

import pytest
from support import ROOT

NOTEBOOK = ROOT / "examples" / "quick_start.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_the_notebook_was_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.real
def test_every_cell_runs(tmp_path):
    code = "import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(map(source, CODE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = ["".join(output.get("text", ())) for cell in CODE for output in cell["outputs"]]
    kept = next(line for text in texts for line in text.splitlines() if line.startswith("mean difference:"))
    nats = next(line for line in done.stdout.splitlines() if line.startswith("mean difference:"))
    assert float(nats.split()[2]) == pytest.approx(float(kept.split()[2]), abs=0.3)
