"""Gates: a gate computes from the hidden state of each token how strongly the token is steered."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from repeng.data.files import written_whole
from repeng.data.pairs import ContrastPair
from repeng.data.schema import checked, shown
from repeng.data.word_questions import without_persona
from repeng.model.sites import Place, capture, eval_mode, site_modules
from repeng.model.strict_json import parse_json
from repeng.model.tensor_files import read_tensors
from repeng.model.tokens import Encoded, encode_text, pad_rows
from repeng.model.types import CausalLM
from repeng.vectors.stored import check_directions, place_of
from repeng.vectors.vector import SteeringVector

KEY = "repeng-gate"  # key of the JSON text in the safetensors metadata of a file
PLACES = Annotated[list[Annotated[list[str | int], Field(min_length=2, max_length=2)]], Field(min_length=1)]
RIDGE = 1e-2  # ridge penalty, as a share of the mean variance of the states


@dataclass(frozen=True, eq=False)
class Gate:
    """A probe `w (d)`, `b ()` for each (site, layer): a token with state h is steered by c · max(0, w·h + b).

    This is a coefficient per token, as in PSR (arXiv 2605.03907). The mean of max(0, w·h + b) over the tokens of the
    fit is 1.
    """

    probes: dict[Place, tuple[Tensor, Tensor]]

    def factor(self, place: Place, hs: Tensor) -> Tensor:
        """The factor `(b t 1)` of each token of states `hs (b t d)`."""
        weight, bias = (part.to(hs) for part in self.probes[place])
        return (hs @ weight + bias).clamp(min=0)[..., None]

    def check(self, vector: SteeringVector) -> None:
        """Raise ValueError unless the gate has a probe for every (site, layer) of a vector."""
        missing = set(vector.directions) - set(self.probes)
        if missing:
            raise ValueError(f"the gate has no probe at {sorted(missing)}; it has {sorted(self.probes)}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; on an error, no file is written."""
        places = list(self.probes)
        tensors = {str(index): torch.cat([w, b[None]]) for index, (w, b) in enumerate(self.probes.values())}
        with written_whole(path) as place:
            save_file(tensors, place, {KEY: json.dumps(places)})

    @classmethod
    def load(cls, path: str | Path) -> "Gate":
        """Read a file that `save` has written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a gate.
        """
        tensors, texts = read_tensors(path)
        if KEY not in texts:
            raise ValueError(f"{path} is not a file of `Gate.save`: its metadata lack the key {KEY!r}")
        listed = checked(PLACES, parse_json(texts[KEY], f"{path}: the text of its header"), f"{path}: its places")
        places = [place_of(f"{layer}.{site}", str(path)) for site, layer in listed]
        if set(tensors) != {str(index) for index in range(len(places))} or len({*places}) < len(places):
            raise ValueError(f"{path} lists {len(places)} places, but has the tensors {shown(sorted(tensors))}")
        both = {place: tensors[str(index)] for index, place in enumerate(places)}
        check_directions(both, str(path))
        if min(map(len, both.values())) < 2:
            raise ValueError(f"{path} holds a probe with too few entries; for a state of width d, it has d + 1")
        return cls({place: (tensor[:-1], tensor[-1]) for place, tensor in both.items()})


@torch.no_grad()
def fit_gate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    pairs: Sequence[ContrastPair],
    *,
    batch_size: int = 32,
) -> Gate:
    """Fit a gate: learn from contrast pairs at which tokens the personas move the state along a vector.

    The target for each token of a suffix is half the difference between the states of the two sides along the
    direction, in units of the direction's length. A ridge regression predicts the target from the token's state
    without a persona.

    Args:
        model: the model that the vector is for.
        tokenizer: its tokenizer.
        vector: the vector that will be gated.
        pairs: contrast pairs with suffixes.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: a pair has no suffix, the vector is for another model, or the personas never push along the vector.
    """
    if not pairs or not all(pair.suffix for pair in pairs):
        raise ValueError("a gate is learned on the suffixes of pairs; give every pair a suffix")
    vector.check(model)
    places = list(vector.directions)
    template = bool(tokenizer.chat_template)
    sides = (
        [p.chosen for p in pairs],
        [p.rejected for p in pairs],
        [without_persona(p, has_template=template) for p in pairs],
    )
    plus, minus, plain = (
        _suffix_states(
            model,
            tokenizer,
            [encode_text(tokenizer, prompt, pair.suffix) for prompt, pair in zip(prompts, pairs, strict=True)],
            places,
            batch_size,
        )
        for prompts in sides
    )
    probes = {}
    for place, direction in vector.directions.items():
        v = direction.to(plus[place])
        pushed = (plus[place] - minus[place]) @ v / (2 * v.square().sum().clamp_min(1e-30))
        probes[place] = _ridge(plain[place], pushed)
    return Gate(probes)


def _ridge(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The probe `w (d)`, `b ()` that predicts `wanted (n)` from `states (n d)`, scaled to a mean factor of 1."""
    states, wanted = states.double(), wanted.double()
    centre = states.mean(dim=0)
    centred = states - centre
    gram = centred.T @ centred / len(states)
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty, centred.T @ (wanted - wanted.mean()) / len(states))
    bias = wanted.mean() - centre @ weight
    mean = (states @ weight + bias).clamp(min=0).mean()
    if not mean > 1e-9:
        raise ValueError("the personas push along the vector at no token of these pairs; check the sign of the vector")
    return (weight / mean).float(), (bias / mean).float()


def _suffix_states(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    places: Sequence[Place],
    batch_size: int,
) -> dict[Place, Tensor]:
    """States `(n d)` of all suffix tokens for each place, float32, on the CPU."""
    modules = site_modules(model, places)
    parts: list[list[Tensor]] = [[] for _ in places]
    with eval_mode(model):
        for start in tqdm(range(0, len(encoded), batch_size), desc="gate", leave=False, delay=1):
            some = encoded[start : start + batch_size]
            batch = pad_rows([one.ids for one in some], tokenizer, model.device, side="left")
            with capture(modules) as outputs:
                model(**batch, use_cache=False, logits_to_keep=1)
            for part, output in zip(parts, outputs, strict=True):
                assert output is not None
                part += [row[-len(one.suffix) :].float().cpu() for row, one in zip(output, some, strict=True)]
    return {place: torch.cat(part) for place, part in zip(places, parts, strict=True)}
