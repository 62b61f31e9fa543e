"""Export an adapter that shifts the residual stream as a steering vector."""

import re
from typing import Any

from torch import nn

from repeng.export.factors import active_adapter
from repeng.model.sites import RESIDUAL, layers_of
from repeng.tuner.layer import SvdSteeringLayer
from repeng.tuner.residual import Residual
from repeng.vectors.vector import SteeringVector, model_type


def vector_of(model: nn.Module, adapter_name: str | None = None) -> SteeringVector:
    """The steering vector equal to an adapter that only shifts the residual stream (`adapter: bias`).

    The vector is the shift at c = 1; the shift is proportional to c. If the adapter is calibrated, so is the vector.

    Raises:
        ValueError: there is no such adapter, there are several, or the adapter does not only shift the stream.
    """
    adapter_name = active_adapter(model, adapter_name)
    layers, sites = _layers_and_shifts(model, adapter_name)
    if not layers or len(sites) < len(layers):
        what = "does more than that" if layers else "is not an adapter of this package"
        raise ValueError(
            f"only an adapter that shifts the residual stream (adapter: bias) is a steering vector; {adapter_name!r} "
            f"{what}. Export it as a LoRA"
        )
    directions = {}
    for site in sites:
        (layer,) = layers_of(model, [site.get_base_layer()])
        directions[(RESIDUAL, layer)] = site.svd_steering_shift[adapter_name].detach().float().cpu()
    own: Any = getattr(model, "peft_config", {}).get(adapter_name)
    metadata = {
        "model_type": model_type(model),
        "model": getattr(model, "name_or_path", None) or None,
        "made_of": "adapter: bias",
    }
    vector = SteeringVector(directions, {key: value for key, value in metadata.items() if value is not None})
    calibration = getattr(own, "calibration", None)
    return vector if calibration is None else vector.calibrated(calibration)


def is_vector(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Whether `vector_of` can export this adapter."""
    layers, sites = _layers_and_shifts(model, active_adapter(model, adapter_name))
    return 0 < len(layers) == len(sites)


def control_vector_name(stem: str, vector: SteeringVector) -> str:
    """A file name that says what a control vector is for: STEM-MODEL-add-residual-layersFIRST-LAST.gguf.

    Ranges of layers are joined by +.
    """
    model = str(vector.model_name or vector.metadata.get("model_type") or "unknown").rpartition("/")[2]
    runs: list[list[int]] = []
    for layer in vector.layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    layers = "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{stem}-{re.sub('[^A-Za-z0-9._-]', '_', model)}-add-residual-layers{layers}.gguf"


def _layers_and_shifts(model: nn.Module, adapter_name: str) -> tuple[list[SvdSteeringLayer], list[Residual]]:
    """The steering layers of an adapter, and those among them that only shift the residual stream."""
    layers: list[SvdSteeringLayer] = []
    layers += [one for one in model.modules() if isinstance(one, SvdSteeringLayer) and adapter_name in one.r]
    return layers, [one for one in layers if isinstance(one, Residual) and adapter_name not in one.svd_steering_in]
