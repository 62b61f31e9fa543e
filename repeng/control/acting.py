"""Find adapted modules that do not influence the model's output: training them would have no effect."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from repeng.control.steer import steer
from repeng.model.sites import eval_mode
from repeng.model.types import CausalLM
from repeng.tuner.residual import Residual

SHOWN = 5


def idle_sites(model: CausalLM, input_ids: Tensor) -> list[str]:
    """Adapted modules that do not influence the logits of these tokens.

    The check is one forward and one backward pass at c = 1: an adapter that acts has a gradient, even if it is new and
    zero. Weights, gradients, modes and random states do not change. Experts are not checked, since a text is routed to
    only a few of them.

    Args:
        model: a model whose adapters are trainable.
        input_ids: `(b t)`, at least two tokens per row, since attention over a single token has no choice.

    Returns:
        Full names of modules in the order of the model. A residual site has the name of its decoder layer.
    """
    sites = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    parameters = {
        name.rpartition(".")[0] if isinstance(module, Residual) else name: own
        for name, module in sites
        if (own := _trainable(module)) and "experts" not in name.split(".")
    }
    flat = [parameter for own in parameters.values() for parameter in own]
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad(), steer(model, 1.0):
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
        gradients = iter(torch.autograd.grad(logits.float().square().sum(), flat, allow_unused=True))
    idle = []
    for name, own in parameters.items():
        of_site = [next(gradients) for _ in own]
        if not any(gradient is not None and bool(gradient.any()) for gradient in of_site):
            idle.append(name)
    return idle


def check_sites(model: CausalLM, input_ids: Tensor) -> None:
    """Raise ValueError, naming the modules, if adapted modules have no effect; see `idle_sites`."""
    idle = idle_sites(model, input_ids)
    if idle:
        more = f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else ""
        raise ValueError(
            f"the adapter has no effect on text at {', '.join(idle[:SHOWN])}{more}: the model does not run these "
            "modules, or does not use their outputs. Adapt other layers or other target_modules"
        )


def _trainable(module: Any) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
