"""The pages that a script writes are what the files of reports say."""

import importlib.util
import json
import re

import pytest
from support import ROOT

from benchmarks import results
from repeng.eval.compare import ADAPTER, PROMPTS

PATHS = sorted(results.FOLDER.glob("*.safetensors"))


def fixed(text):
    """Without the intervals: what is drawn for them may differ between versions of PyTorch."""
    return re.sub(r"\[[-\d., ]+\]", "", text)


def test_the_page_and_the_table_of_the_readme_are_generated():
    assert PATHS and fixed(results.PAGE.read_text(encoding="utf-8")) == fixed(results.page(PATHS))
    readme = results.README.read_text(encoding="utf-8")
    assert fixed(results.readme_with_table(readme, PATHS)) == fixed(readme)
    assert all(path.with_suffix(".png").is_file() for path in PATHS)


def test_a_readme_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="end of results on a real model"):
        results.readme_with_table(f"head\n{results.BEGIN}\nand all the rest of the page", PATHS)


def test_rows_are_in_the_order_of_their_effect():
    comparison, _ = results.comparison_in(results.FOLDER / "smollm2-mood.safetensors")
    rows = list(results.effect_rows(comparison))
    effects = [comparison.at_yardstick(results.SEEDS.sub("", name))[0].item() for name in rows]
    assert effects == sorted(effects, reverse=True) and PROMPTS in rows
    assert any(name.startswith(ADAPTER) for name in rows)


@pytest.mark.parametrize("name", ["draw_ideas", "draw_loss_geometry"])
def test_the_tables_of_the_docs_are_generated(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page, figures = script.PAGE.read_text(encoding="utf-8"), json.loads(script.FIGURES.read_text(encoding="utf-8"))
    assert script.with_tables(page, figures) == page
    figures.popitem()
    assert script.with_tables(page, figures) != page
