"""Extract steering vectors from contrast pairs."""

import inspect
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.data.files import nearest
from repeng.data.pairs import ContrastPair
from repeng.model.activations import Loss, Tokens, gradients, hidden_states, persona_loss, token_weights
from repeng.model.sites import RESIDUAL, Place, decoder_layers, site_widths, writing_basis
from repeng.model.sources import name_of_folder
from repeng.model.tokens import encode, pad_rows
from repeng.model.types import CausalLM
from repeng.tuner.targets import select_layers
from repeng.vectors.directions import METHODS
from repeng.vectors.vector import SteeringVector, model_type

SHOWN_PAIRS = 3
DOUBTFUL = 0.6


def extract(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ContrastPair],
    *,
    sites: Sequence[str] = (RESIDUAL,),
    layers: Sequence[int] | int | str | None = None,
    method: str = "mean_diff",
    tokens: Tokens = "last",
    held_out: float = 0.2,
    loss: Loss = persona_loss,
    batch_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> SteeringVector:
    """Extract a direction for each site and layer from the current model, including its adapters.

    At c = 1, the vector moves a hidden state by the length of the mean difference between the two sides, + toward
    chosen. `metadata["accuracy"]` holds the held-out accuracy of each (site, layer): a direction is computed from the
    other pairs, and the accuracy is the share of held-out pairs whose chosen side lies further along it. The vector
    itself is computed from all pairs.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        pairs: contrast pairs, at least two.
        sites: "residual" or names of linear modules, such as "up_proj".
        layers: layer indices from 0, a range of the depth such as "0.3-0.7", or None for all layers.
        method: a name in `repeng.vectors.directions.METHODS`; that module defines the methods.
        tokens: the tokens whose states are read: "last"; a number n for the mean of the last n; or "mean" of all.
        held_out: share of the pairs held out for the accuracy; 0 for no accuracy.
        loss: for "gradient" and "fisher": maps next-token logits `(b v)` of chosen and of rejected to a loss `(b)`.
        batch_size: prompts per forward pass.
        seed: seed of the held-out split and of the random draws of "fisher".
        options: keyword arguments of the method, such as `k`.

    Warns:
        UserWarning: a held-out accuracy is below 60 %; or a (site, layer) is left out, because the two sides do not
            differ there or because it does not run on text, such as cross-attention to images.

    Raises:
        ValueError: there are too few pairs; a method, site, layer or option is unknown; or the sides differ nowhere.
    """
    function = _find_method(method, options)
    sites = [sites] if isinstance(sites, str) else sites
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs were given; give at least 2")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be from 0 to below 1; got {held_out}")
    places = [(site, layer) for layer in select_layers(len(decoder_layers(model)), layers) for site in sites]
    site_widths(model, places)  # raises if a site does not exist
    rows = [[encode(tokenizer, side, pair.suffix).ids for side in (pair.chosen, pair.rejected)] for pair in pairs]
    token_weights(torch.ones(1, 1, dtype=torch.long), tokens)  # raises for a wrong `tokens` before the model runs

    flat = [row[side] for side in (0, 1) for row in rows]
    states = hidden_states(model, tokenizer, flat, places, tokens=tokens, batch_size=batch_size)
    places = _places_that_run(places, states)
    # `gradients` counts its batch in pairs, which have two prompts each.
    more = {"loss": loss, "tokens": tokens, "seed": seed, "batch_size": max(1, batch_size // 2)}
    inputs = _method_inputs(function, model, tokenizer, rows, places, **more)
    used, left_out = split(len(pairs), held_out, seed)

    directions: dict[Place, Tensor] = {}
    accuracy: dict[str, float] = {}
    for place in places:
        chosen, rejected = states[place].chunk(2)
        length = (chosen - rejected).mean(dim=0).norm()
        if length == 0:
            continue
        fit = fitter(function, chosen, rejected, inputs(place), options)
        direction = fit(torch.arange(len(pairs)))
        if not direction.norm() > 0:  # also where it is NaN
            continue
        directions[place] = direction * (length / direction.norm())
        if left_out.numel():
            along = (chosen - rejected)[left_out] @ fit(used)
            accuracy[f"{place[1]}.{place[0]}"] = (along > 0).float().mean().item()
    _warn_of_doubts(places, directions, accuracy)
    metadata = {
        "method": method,
        "options": options,
        "tokens": tokens,
        "pairs": len(pairs),
        "accuracy": accuracy,
        "model_type": model_type(model),
        "model": _base_name(model),
        "read": [_read_tokens(tokenizer, row, tokens) for row in rows[:SHOWN_PAIRS]],
    }
    return SteeringVector(directions, {key: value for key, value in metadata.items() if value is not None})


def _base_name(model: CausalLM) -> str | None:
    """The name or path of the base model; an embedded or packaged model has a name wherever its files are."""
    path = getattr(model, "name_or_path", None)
    return name_of_folder(path) or path if path else None


def _places_that_run(places: Sequence[Place], states: dict[Place, Tensor]) -> list[Place]:
    """The places that have hidden states; warns about the others, and raises ValueError if none is left."""
    idle = ", ".join(f"{site} of layer {layer}" for site, layer in places if (site, layer) not in states)
    if not states:
        raise ValueError(f"none of these sites runs on text alone: {idle}; choose other layers or sites")
    if idle:
        warnings.warn(f"these sites are left out, because they do not run on text alone: {idle}", stacklevel=3)
    return [place for place in places if place in states]


def _find_method(method: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """The function of this method; raises ValueError for an unknown method or an option that it does not have."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{nearest(method, METHODS)}; choose one of {', '.join(METHODS)}")
    signature = inspect.signature(METHODS[method]).parameters.values()
    allowed = [p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            listed = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            raise ValueError(f"method {method!r} has no option {name!r}{nearest(name, allowed)}; {listed}")
    return METHODS[method]


def _method_inputs(
    function: Callable[..., Tensor],
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[Sequence[int]]],
    places: Sequence[Place],
    **settings: Any,
) -> Callable[[Place], dict[str, Tensor]]:
    """The inputs that a method needs besides hidden states, by parameter name; `settings` go to `gradients`."""
    needed = inspect.signature(function).parameters
    read = None
    if needed.keys() & {"descent", "scores"}:
        pairs = [(row[0], row[1]) for row in rows]
        read = gradients(model, tokenizer, pairs, places, **settings)

    def inputs(place: Place) -> dict[str, Tensor]:
        site, layer = place
        tensors = {}
        if "basis" in needed:
            tensors["basis"] = writing_basis(model, layer, site)
        if read is not None and "descent" in needed:
            tensors["descent"] = read.descent[place]
        if read is not None and "scores" in needed:
            tensors["scores"] = read.scores[place]
        return tensors

    return inputs


def fitter(
    function: Callable[..., Tensor],
    chosen: Tensor,
    rejected: Tensor,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
) -> Callable[[Tensor], Tensor]:
    """The method as a function of the indices of the pairs that it uses."""

    def fit(index: Tensor) -> Tensor:
        both = torch.cat([index, index + len(chosen)])
        mine = {name: tensor if name == "basis" else tensor[both] for name, tensor in inputs.items()}
        return function(chosen[index], rejected[index], **mine, **options)

    return fit


def split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the pairs from which the accuracy's direction is computed, and of the held-out pairs."""
    order = random.Random(seed).sample(range(n), n)
    n_out = min(round(share * n), n - 2)
    return torch.tensor(sorted(order[n_out:])), torch.tensor(sorted(order[:n_out]), dtype=torch.long)


def _warn_of_doubts(places: Sequence[Place], directions: dict[Place, Tensor], accuracy: dict[str, float]) -> None:
    """Warn about places that are left out or have a low accuracy; raise ValueError if no place is left."""
    equal = [f"{site} of layer {layer}" for site, layer in places if (site, layer) not in directions]
    if not directions:
        raise ValueError(
            f"chosen and rejected have the same hidden states, or the loss has no gradient, at {', '.join(equal)}: "
            "the tokens that are read do not depend on the word that differs; choose a later site or layer, or other "
            "tokens"
        )
    if equal:
        reason = "both sides are the same there, or the loss has no gradient"
        warnings.warn(f"these sites are left out, because {reason}: {', '.join(equal)}", stacklevel=3)
    weak = {name: share for name, share in accuracy.items() if share < DOUBTFUL}
    if weak:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in weak.items())
        warnings.warn(
            f"held-out accuracy below {DOUBTFUL:.0%} at {listed}. Likely causes: the pairs end where the next word "
            "does not depend on the persona; the personas are swapped in some pairs; there are too few pairs; the "
            "layer does not represent the persona. vector.describe() shows the tokens that were read",
            stacklevel=3,
        )


def _read_tokens(tokenizer: PreTrainedTokenizerBase, row: Sequence[Sequence[int]], tokens: Tokens) -> dict[str, str]:
    """The text of the tokens that are read on both sides of a pair."""
    shown = {}
    for name, ids in zip(("chosen", "rejected"), row, strict=True):
        batch = pad_rows([ids], tokenizer)
        counted = token_weights(batch["attention_mask"], tokens)[0] > 0
        shown[name] = tokenizer.decode(batch["input_ids"][0][counted])
    return shown
