"""The pages that a script writes are what the files of reports say."""

from benchmarks import results
from repeng.eval.compare import ADAPTER, PROMPTS

PATHS = sorted(results.FOLDER.glob("*.safetensors"))


def test_the_page_and_the_table_of_the_readme_are_generated():
    assert PATHS and results.PAGE.read_text(encoding="utf-8") == results.page(PATHS)
    readme = results.README.read_text(encoding="utf-8")
    assert results.readme_with_table(readme) == readme
    assert all(path.with_suffix(".png").is_file() for path in PATHS)


def test_rows_are_in_the_order_of_their_effect():
    comparison, _ = results.comparison_in(results.FOLDER / f"{results.IN_README[0]}.safetensors")
    rows = list(results.effect_rows(comparison))
    effects = [comparison.at_yardstick(name.partition(" (3 seeds)")[0])[0].item() for name in rows]
    assert effects == sorted(effects, reverse=True) and PROMPTS in rows
    assert any(name.startswith(ADAPTER) for name in rows)
