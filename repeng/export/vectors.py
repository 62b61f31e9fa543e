"""The shifts of an adapter on the residual stream as a steering vector."""

from typing import Any

from torch import nn

from repeng.export.factors import active_adapter
from repeng.model.sites import RESIDUAL, layers_of
from repeng.tuner.layer import SvdSteeringLayer
from repeng.tuner.residual import Residual
from repeng.vectors.vector import SteeringVector, model_type


def vector_of(model: nn.Module, adapter_name: str | None = None) -> SteeringVector:
    """What an adapter that only shifts the residual stream (`adapter: bias`) adds at c = 1; it scales with c.

    Raises:
        ValueError: there is no such adapter, there are several, or it does something else as well.
    """
    adapter_name = active_adapter(model, adapter_name)
    layers = [one for one in model.modules() if isinstance(one, SvdSteeringLayer) and adapter_name in one.r]
    sites = [one for one in layers if isinstance(one, Residual) and adapter_name not in one.svd_steering_in]
    if not layers or len(sites) < len(layers):
        what = "does more than that" if layers else "is none of this package"
        raise ValueError(
            f"only an adapter that shifts the residual stream (adapter: bias) is a steering vector; {adapter_name!r} "
            f"{what}. Export it as a LoRA"
        )
    directions = {}
    for site in sites:
        (layer,) = layers_of(model, [site.get_base_layer()])
        directions[(RESIDUAL, layer)] = site.svd_steering_shift[adapter_name].detach().float().cpu()
    own: Any = getattr(model, "peft_config", {}).get(adapter_name)
    vector = SteeringVector(directions, {"model_type": model_type(model), "made_of": "adapter: bias"})
    calibration = getattr(own, "calibration", None)
    return vector if calibration is None else vector.calibrated(calibration)
