"""The model card of a published vector."""

from typing import TYPE_CHECKING

from repeng.data.cards import cell, front_matter, link

if TYPE_CHECKING:
    from repeng.vectors.vector import SteeringVector


def vector_card(vector: "SteeringVector", repo_id: str) -> str:
    """README.md of a vector whose metadata hold the hub id of its model."""
    known, base = vector.metadata, str(vector.model_name)
    facts = {
        "base model": link(base),
        "method": known.get("method"),
        "pairs": known.get("pairs"),
        "tokens that were read": known.get("tokens"),
        "sites": ", ".join(vector.sites),
        "layers": ", ".join(map(str, vector.layers)),
        "held-out accuracy": _accuracy(list(known.get("accuracy", {}).values())),
        "calibration": _calibration(known.get("calibration")),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in (None, ""))
    read = [
        f"| {cell(''.join(pair['chosen']))} | {cell(''.join(pair['rejected']))} |"
        for pair in known.get("read", [])[:3]
    ]
    shown = "\n".join(["", "| read: toward c = +1 | toward c = −1 |", "|---|---|", *read, ""]) if read else ""
    return f"""{front_matter(base, ["steering", "steering-vector", "repeng"], library_name="repeng")}
# Steering vector for {base}

Directions in the activations of a language model. The coefficient c moves the model toward one side (c = +1) or the
other side (c = −1); at c = 0 it is the base model.

| | |
|---|---|
{rows}
{shown}
## Use

```python
from repeng import SteeringVector, load_model, steer

model, tokenizer = load_model("{base}")
vector = SteeringVector.from_pretrained("{repo_id}")
messages = [{{"role": "user", "content": "How was your day?"}}]
if tokenizer.chat_template:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
else:
    prompt = tokenizer("Today I think that", return_tensors="pt")
for c in (-1.0, 0.0, 1.0):
    with steer(model, c, vector=vector):
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(c, tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

- A server with a coefficient per request: `repeng serve {repo_id}`
- A control vector for llama.cpp: `repeng export {repo_id} --to gguf`
"""


def _accuracy(values: list[float]) -> str:
    if not values:
        return ""
    return f"{min(values):.0%}" if len(values) == 1 else f"{min(values):.0%} to {max(values):.0%} over the places"


def _calibration(units: dict | None) -> str:
    if not units:
        return "none: c = 1 adds the directions as they are"
    budget = units.get("budget")
    nats = budget.get("nats") if isinstance(budget, dict) else None
    told = f"c = ±1 spends {nats:g} nats per token; " if isinstance(nats, int | float) else ""
    return f"{told}c = 1 is {units['plus']:.3g} and c = −1 is {units['minus']:.3g} times the directions"
