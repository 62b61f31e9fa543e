"""Compare all extraction methods at their best layers, for both traits of the embedded model.

`python -m benchmarks.vectors` prints a Markdown table; `--notes` also puts it into research_notes.md. All vectors come
from the same pairs. The best layer is the one with the largest range on the held-out questions themselves, which
flatters all methods in the same way.
"""

import argparse
import datetime
import warnings
from pathlib import Path

from tqdm.auto import tqdm

from repeng import EvalReport, SteeringVector, evaluate, extract, steer, tiny
from repeng._command import command
from repeng.eval.evaluate import VECTOR_COEFFICIENTS
from repeng.eval.measure import prompt_dial
from repeng.eval.report.tables import markdown, percent

NOTES = Path(__file__).parent.parent / "research_notes.md"
METHODS = {
    "mean_diff": {},
    "pca_diff": {},
    "pca_center": {},
    "svd": {},
    "svd, k = 4": {"k": 4},
    "svd, k = 4, whitened": {"k": 4, "whiten": True},
    "weight_svd": {},
    "gradient": {},
    "fisher": {},
}
TEXTS = {
    "honesty": ("the speaker is honest .", "the speaker is dishonest ."),
    "mood": ("the speaker is cheerful .", "the speaker is gloomy ."),
}


def measure(trait: str, n_pairs: int, every: int) -> dict[str, tuple[EvalReport, int | None, float | None]]:
    """By method: the report at the best layer, the best layer, and the held-out accuracy there."""
    model, tokenizer = tiny.load()
    pairs = tiny.pairs(trait, n_pairs, 0)
    questions = tiny.questions(trait, "held_out")[::every]
    texts = tiny.neutral_texts(64, tiny.UNSEEN_SEED)

    def report(dial, coefficients) -> EvalReport:
        return evaluate(model, tokenizer, questions, dial, coefficients, neutral_texts=texts)

    found = {"persona prompts": (report(prompt_dial(*TEXTS[trait]), (-1, 1)), None, None)}
    for name, options in tqdm(METHODS.items(), desc=trait):
        vector = extract(model, tokenizer, pairs, method=name.split(",")[0], **options)
        reports = {}
        for layer in vector.layers:
            alone: SteeringVector = vector.select(layers=[layer])
            reports[layer] = report(lambda c, v=alone: steer(model, c, vector=v), VECTOR_COEFFICIENTS)
        best = max(reports, key=lambda layer: reports[layer].range)
        found[name] = (reports[best], best, vector.metadata["accuracy"][f"{best}.residual"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=72)
    parser.add_argument("--every", type=int, default=3, help="use every n-th question only")
    parser.add_argument("--notes", action="store_true", help="put the table into research_notes.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="held-out accuracy|left out")
    rows = {}
    for trait in TEXTS:
        for name, (report, layer, accuracy) in measure(trait, options.pairs, options.every).items():
            rows[f"{name}, {trait}"] = {
                "best layer": "–" if layer is None else str(layer),
                "held-out accuracy": "–" if accuracy is None else f"{accuracy:.0%}",
                "range": f"{report.range:.2f}",
                "+ arm": f"{report.arm(+1).gain:.2f}",
                "− arm": f"{report.arm(-1).gain:.2f}",
                "wrong way": percent(report.wrong_way),
            }
    table = markdown(rows, "method and trait")
    print(table)
    if options.notes:
        command = f"`python -m benchmarks.vectors --pairs {options.pairs} --every {options.every} --notes`"
        title = f"## {datetime.date.today()} Extraction methods on the embedded model"
        entry = f"{title}\n\n{command}, range in nats inside the budget.\n\n"
        head, first, rest = NOTES.read_text(encoding="utf-8").partition("\n## ")
        NOTES.write_text(f"{head}\n{entry}{table}\n{first}{rest}", encoding="utf-8")


if __name__ == "__main__":
    with command():
        main()
