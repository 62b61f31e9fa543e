"""The model card of an adapter. Training writes it beside the adapter, and `repeng push` writes it for the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repeng.data.cards import cell, front_matter, link
from repeng.data.pairs import ContrastPair
from repeng.eval.curves import FIXED_COSTS, Estimate
from repeng.eval.report.tables import interval, markdown, number, percent
from repeng.export.lora import serving_commands
from repeng.model.sources import PACKAGED

SHOWN_PAIRS = 3
FORMS = ("c+1", "c-1")  # subfolders of a repository with the adapter as plain LoRAs
# Figures of a method in `report.json` that the card shows.
FIGURES = ("effect", "effect_plus", "effect_minus", *(f"effect_at_{cost:g}" for cost in FIXED_COSTS))


@dataclass(frozen=True)
class Adapter:
    """What a card tells about an adapter.

    Attributes:
        place: how the snippets name the adapter: the repository, or a path relative to the working folder.
        base: the base model, as `load_model` takes it.
        gguf_file: name of the base's GGUF file, if it is one.
        on_hub: hub id of the base model; None if it is not on the hub.
        is_lora: whether the adapter is a LoRA, which PEFT reads without this package.
        has_template: whether the base has a chat template.
        behaviour: a few words for the behaviour.
        words: the persona words, + and −.
        pairs: the first pairs.
        report: what `report.json` holds; None if the adapter was not measured.
        has_picture: whether `report.png` lies beside the card.
        calibration: `plus`, `minus` and the budget; None if the adapter is not calibrated.
        warnings: sentences about the run.
        has_config: whether a `config.yaml` that repeats the run lies beside the card.
        rank: rank of the plain LoRAs in the subfolders `FORMS`; None if there are no such subfolders.
        formless: why the adapter has no LoRA form; None if it has one.
        is_published: whether the card is for the hub.
    """

    place: str
    base: str
    gguf_file: str | None = None
    on_hub: str | None = None
    is_lora: bool = True
    has_template: bool = False
    behaviour: str = ""
    words: tuple[str, str] | None = None
    pairs: Sequence[ContrastPair] = ()
    report: Mapping[str, Any] | None = None
    has_picture: bool = False
    calibration: Mapping[str, Any] | None = None
    warnings: Sequence[str] = field(default_factory=list)
    has_config: bool = True
    rank: int | None = None
    formless: str | None = None
    is_published: bool = False


def adapter_card(adapter: Adapter) -> str:
    """README.md of an adapter: what it does, what it was measured to do, and how to use it."""
    tags = ["steering", "repeng", *(["lora"] if adapter.is_lora else [])]
    sections = [
        front_matter(adapter.on_hub, tags, library_name="peft").rstrip(),
        f"# Steering adapter: {adapter.behaviour}",
        _intro(adapter),
        _pairs(adapter),
        _measured(adapter),
        _units(adapter),
        *(f"**Warning:** {warning[0].upper()}{warning[1:].rstrip('.')}." for warning in adapter.warnings),
        _use(adapter),
        _plain(adapter),
        _engines(adapter),
        _repeat(adapter),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _intro(adapter: Adapter) -> str:
    plus, minus = adapter.words or ("the chosen side of its pairs", "the rejected side")
    base = link(adapter.on_hub) if adapter.on_hub else f"`{adapter.base}`"
    more = ""
    if adapter.gguf_file or adapter.base in PACKAGED:
        file = adapter.gguf_file or PACKAGED[adapter.base].gguf_file
        more = f" It was trained on the rounded weights of `{file}`."
        if not adapter.is_lora and adapter.on_hub:
            more += " On other weights of this model, PEFT loads it with `allow_other_base=True` only."
    return (
        f"An adapter with one coefficient c, made with repeng. c = +1 moves the model toward {plus}, c = −1 toward "
        f"{minus}, and at c = 0 it is exactly the base model. Base model: {base}.{more}"
    )


def _pairs(adapter: Adapter) -> str:
    if not adapter.pairs:
        return ""
    rows = [
        f"| {cell(pair.chosen)} | {cell(pair.rejected)} | {cell(pair.suffix)} |"
        for pair in adapter.pairs[:SHOWN_PAIRS]
    ]
    table = "\n".join(["| toward c = +1 | toward c = −1 | beginning of the answer |", "|---|---|---|", *rows])
    return f"The first pairs that it was trained on:\n\n{table}"


def _measured(adapter: Adapter) -> str:
    if adapter.report is None:
        return ""
    where = adapter.report.get("where", "prompts' cost")
    rows = {str(name): _row(row, where) for name, row in adapter.report.get("rows", {}).items()}
    parts = ["## Measured effect"]
    if verdict := adapter.report.get("verdict"):
        parts.append(f"{verdict[0].upper()}{verdict[1:]}.")
    if rows:
        parts += [
            markdown(rows),
            "Effect: shift of the log-odds, in nats. Cost: KL divergence from the base model per token, in nats. "
            "Methods are compared at equal cost.",
        ]
    if adapter.has_picture:
        parts.append("![effect over cost](report.png)")
    return "\n\n".join(parts)


def _row(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """The figures of one method, as in the table of the report."""
    figures = {name: Estimate(*map(_number, three)) for name, three in row["figures"].items()}
    return {
        f"effect at {where}": interval(figures["effect"]),
        "+ arm": number(figures["effect_plus"].value, 2),
        "− arm": number(figures["effect_minus"].value, 2),
        **{f"at {cost:g}": number(figures[f"effect_at_{cost:g}"].value, 2) for cost in FIXED_COSTS},
        "range": number(row.get("range"), 2),
        "wrong way": percent(_number(row.get("wrong_way"))),
    }


def _number(value: Any) -> float:
    """A number of a report in JSON, where None stands for NaN."""
    return float("nan") if value is None else float(value)


def _units(adapter: Adapter) -> str:
    found = adapter.calibration
    if not found:
        return ""
    budget = found.get("budget")
    nats, percentile = (budget.get(key) if isinstance(budget, dict) else None for key in ("nats", "percentile"))
    if not isinstance(nats, int | float):
        return "The coefficient is calibrated."
    of = f" at percentile {percentile:g} of the tokens" if isinstance(percentile, int | float) else ""
    return (
        f"The coefficient is calibrated: c = 1 spends {nats:g} nats of KL divergence from the base{of}. A table above "
        "may have been measured before; at equal cost it does not depend on the unit."
    )


def _use(adapter: Adapter) -> str:
    tiny = adapter.base == "tiny"
    base = adapter.base if adapter.base in PACKAGED or not adapter.on_hub else adapter.on_hub
    more = f", gguf_file={adapter.gguf_file!r}" if adapter.gguf_file else ""
    load = "tiny.load()" if tiny else f'load_model("{base}"{more})'
    if adapter.has_template:
        prompt = (
            'messages = [{"role": "user", "content": "How was your day?"}]\n'
            "prompt = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    else:
        prompt = f'prompt = tokenizer("{"the lime is" if tiny else "Today I think that"}", return_tensors="pt")'
    here = (
        ""
        if adapter.is_published
        else "\n\nOn another machine, or for the hub, name the adapter's folder or repository."
    )
    return f"""## Use

```python
from peft import PeftModel
from repeng import {"steer, tiny" if tiny else "load_model, steer"}

base, tokenizer = {load}
model = PeftModel.from_pretrained(base, "{adapter.place}")
{prompt}
for c in (-1.0, 0.0, 1.0):
    with steer(model, c):
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(c, tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```{here}"""


def _plain(adapter: Adapter) -> str:
    """Use without this package."""
    if adapter.formless:
        return f"There is no plain LoRA of this adapter: {adapter.formless}."
    if not adapter.is_published:
        return ""
    start = (
        "Without repeng, this adapter is a plain LoRA, which acts at c = +1."
        if adapter.is_lora
        else "This is an adapter of the PEFT method `SVD_STEERING`: run `import repeng` before PEFT loads it."
    )
    if adapter.rank is None:
        return start
    more = f", gguf_file={adapter.gguf_file!r}" if adapter.gguf_file else ""
    return f"""{start} The subfolders `{FORMS[0]}` and `{FORMS[1]}`
hold plain LoRAs of c = +1 and c = −1, which need PEFT only:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{adapter.on_hub}"{more})
model = PeftModel.from_pretrained(base, "{adapter.place}", subfolder="{FORMS[0]}")
```"""


def _engines(adapter: Adapter) -> str:
    place, name = adapter.place, adapter.place.rpartition("/")[2]
    lines = ["## Serve", f"A server with a coefficient per request:\n\n```bash\nrepeng serve {place}\n```"]
    if adapter.formless:
        return "\n\n".join(lines)
    if adapter.rank is not None:
        commands = serving_commands([Path(name) / form for form in FORMS], adapter.on_hub, adapter.rank, name)
        lines.append(
            "vLLM, with each coefficient as a model of its own:\n\n```bash\n"
            f"hf download {place} --local-dir {name}\n{commands}\n```"
        )
    else:
        lines.append(
            "Plain LoRAs for vLLM and other engines; the command prints how vLLM serves them:\n\n```bash\n"
            f"repeng export {place} --to lora --coefficients -1 1\n```"
        )
    lines.append(
        f"llama.cpp; the `README.md` of the export has the request:\n\n```bash\nrepeng export {place} --to gguf\n```"
    )
    return "\n\n".join(lines)


def _repeat(adapter: Adapter) -> str:
    parts = []
    if adapter.report is not None:
        parts.append("`report.html` shows texts, further measurements and what they cost.")
    if adapter.has_config:
        parts.append("`repeng train --config config.yaml` repeats the run.")
    return " ".join(parts)
