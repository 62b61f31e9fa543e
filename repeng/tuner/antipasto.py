"""Load adapters that AntiPaSTO (wassname/AntiPaSTO) wrote, as adapters of this method."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from repeng.tuner.base import base_of, dense_weight, is_linear
from repeng.tuner.config import SvdSteeringConfig
from repeng.tuner.fingerprint import QUANTISED_DISTANCE, take_fingerprint
from repeng.tuner.keys import IN_PEFT, check_keys
from repeng.tuner.model import require_modules

PEFT_TYPE = "APASTOADAPTER"
CONFIG, WEIGHTS, BASES = "adapter_config.json", "adapter_model.safetensors", "0_svd_bases.safetensors"
TURNS = {"v": "in", "u": "out"}  # names of the rotated sides: AntiPaSTO's -> this method's


def load_antipasto(model: PreTrainedModel, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load an adapter that AntiPaSTO's `save_adapter` wrote into the base `model`; c of `steer` is AntiPaSTO's alpha.

    In AntiPaSTO (antipasto/peft_utils/antipasto_adapter.py) the adapted weight is
    `W − U S Vᵀ + U R_u(α) diag(S + αδ) R_v(α)ᵀ Vᵀ`. R(α) is the Cayley rotation of `α l tanh((P − Pᵀ) / l)`, with
    l = 2 tan(max_rotation_angle / 2). This method computes exactly the same with λ = δ and `additive_scale`.
    `save_pretrained` writes the adapter in the format of this method.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another kind of adapter, the adapter uses another rotation method, its files do
            not fit together, or it is for another base model.
    """
    config, weights, bases = _read(Path(folder))
    names = sorted({key.removeprefix(IN_PEFT).rpartition(".")[0] for key in weights})
    sides = [side for side in TURNS if config[f"rotate_{side}"]]
    learned = ["delta_s", *(f"rotation_params_{side}" for side in sides)]
    check_keys({f"{IN_PEFT}{name}.antipasto_{part}" for name in names for part in learned}, set(weights), adapter_name)
    check_keys({_basis(name, part) for name in names for part in "usv"}, set(bases), adapter_name)
    require_modules(model, names)
    rank = max(2, *(bases[_basis(name, "s")].numel() for name in names))
    state: dict[str, Tensor] = {}
    for name in names:
        u, s, v = (bases[_basis(name, part)].float() for part in "usv")
        delta, *turns = (weights[f"{IN_PEFT}{name}.antipasto_{part}"].float() for part in learned)
        _check_shapes(name, u, s, v, delta, turns)
        problem = _difference(model.get_submodule(name), u, s, v)
        if problem:
            made_for = config.get("base_model_name_or_path") or "unnamed"
            raise ValueError(
                f"this adapter was made for another base model ({made_for}): {name} {problem}. Load that model"
            )
        here = {
            "u": _widened(u, rank),
            "v": _widened(v, rank),
            "s": _widened(s, rank),
            "lambda": _widened(delta, rank),
        }
        for side, turn in zip(sides, turns, strict=True):
            here[TURNS[side]] = _triangle(turn, config["max_rotation_angle"], rank)
        state.update({f"{IN_PEFT}{name}.svd_steering_{part}": tensor for part, tensor in here.items()})
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{folder} gives NaN or infinite numbers at {broken[0]}; the adapter seems to be broken")
    own = SvdSteeringConfig(
        r=rank,
        target_modules=names,
        resolved_modules=names,
        rotate_input="v" in sides,
        rotate_output="u" in sides,
        additive_scale=True,
        shift=False,
        init_bases=False,
        fingerprint=take_fingerprint(model, names),
        task_type=config.get("task_type"),
        inference_mode=True,
    )
    steered = get_peft_model(model, own, adapter_name)
    set_peft_model_state_dict(steered, state, adapter_name)
    return steered


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read the configuration, the learned tensors and the bases; check the fields of the configuration."""
    missing = [name for name in (CONFIG, WEIGHTS, BASES) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; AntiPaSTO's save_adapter writes {CONFIG}, {WEIGHTS} and, with "
            f"save_svd_bases=True, {BASES}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights, bases = load_file(folder / WEIGHTS), load_file(folder / BASES)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); copy the files again") from error
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder} holds an adapter of type {kind!r}, not {PEFT_TYPE}: use PeftModel.from_pretrained")
    lacking = {"rotate_u", "rotate_v", "rotation_method", "max_rotation_angle"} - config.keys()
    if lacking:
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(sorted(lacking))}; save the adapter with AntiPaSTO again"
        )
    if config["rotation_method"] != "cayley":
        raise ValueError(
            f"{folder} uses rotation_method {config['rotation_method']!r}, but this method supports 'cayley' only; "
            "train the adapter with rotation_method 'cayley'"
        )
    if not weights:
        raise ValueError(f"{folder / WEIGHTS} holds no tensor; save the adapter with AntiPaSTO again")
    return config, weights, bases


def _basis(name: str, part: str) -> str:
    """The key of a module's U, S or V in the bases file."""
    return f"svd_bases.{(IN_PEFT + name).replace('.', '_')}.{part}"


def _check_shapes(name: str, u: Tensor, s: Tensor, v: Tensor, delta: Tensor, turns: list[Tensor]) -> None:
    r = s.numel()
    fits = s.ndim == 1 and u.ndim == v.ndim == 2 and u.shape[1] == v.shape[1] == r and delta.shape == (r,)
    if not fits or any(turn.shape != (r, r) for turn in turns):
        shapes = [tuple(tensor.shape) for tensor in (u, s, v, delta, *turns)]
        raise ValueError(
            f"the tensors of {name} have shapes {shapes}, which do not share one rank; check that {WEIGHTS} and "
            f"{BASES} come from one save"
        )


def _difference(module: nn.Module, u: Tensor, s: Tensor, v: Tensor) -> str | None:
    """A description of how the module violates `Uᵀ W V = diag(S)`, or None (up to quantisation error)."""
    if not is_linear(module):
        return f"is a {type(module).__name__} here, not a linear module"
    weight = dense_weight(base_of(module)).cpu()
    if weight.shape != (len(u), len(v)):
        return f"has shape {tuple(weight.shape)} here and {(len(u), len(v))} in the adapter"
    distance = ((u.mT @ weight @ v - s.diag()).norm() / s.norm()).item()
    return None if distance <= QUANTISED_DISTANCE else f"has singular values that differ by {distance:.0%}"


def _widened(tensor: Tensor, rank: int) -> Tensor:
    """Pad the last dimension with zeros up to `rank`.

    A module may have fewer directions than `rank`; a zero direction does nothing.
    """
    return nn.functional.pad(tensor, (0, rank - tensor.shape[-1])).contiguous()


def _triangle(turn: Tensor, max_angle: float | None, rank: int) -> Tensor:
    """The upper triangle `(rank(rank−1)/2)` of the skew matrix that AntiPaSTO computes from its parameters `(r r)`."""
    skew = turn - turn.mT
    if max_angle is not None and max_angle < math.pi - 1e-6:
        limit = 2 * math.tan(max_angle / 2)
        skew = limit * torch.tanh(skew / limit)
    rows, columns = torch.triu_indices(rank, rank, 1)
    wide = nn.functional.pad(skew, (0, rank - len(skew), 0, rank - len(skew)))
    return wide[rows, columns]
