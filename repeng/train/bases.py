"""Which singular directions of a weight matter to the pairs."""

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repeng.activations import Tap, collect
from repeng.control import steer
from repeng.sites import decoder_layers
from repeng.tuner.targets import is_linear


def pair_differences(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict], last_n: int
) -> dict[str, Tensor]:
    """Chosen minus rejected, `(b d)`, by adapted module, each the mean over the last tokens of a prompt.

    The input of a linear module, the output of a decoder layer, in the base model.
    """
    names = model.peft_config[model.active_adapter].resolved_modules
    base = model.get_base_model()
    modules = [base.get_submodule(name) for name in names]
    taps = [Tap(module, "input" if is_linear(module) else "output") for module in modules]
    rows = [example[side] for side in ("chosen_ids", "rejected_ids") for example in examples]
    layers = decoder_layers(base)
    reached = [i for i, layer in enumerate(layers) if any(module in set(layer.modules()) for module in modules)]
    with steer(model, 0.0):
        read = collect(base, tokenizer, rows, taps, layers[max(reached, default=len(layers) - 1)], tokens=last_n)
    return {name: states[: len(examples)] - states[len(examples) :] for name, states in zip(names, read, strict=True)}
