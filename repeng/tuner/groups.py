"""Which linear modules of a decoder layer read or write the residual stream, recognised by their names."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from repeng.tuner.base import base_of, linear_shape
from repeng.tuner.decoder import RESIDUAL, last, linear_modules, matches

Role = Literal["writes", "reads", "inside"]
WRITERS = "residual-writers"
READERS = "residual-readers"
ALL_LINEAR = "all-linear"
# Suffixes of names relative to the decoder layer. An entry that starts with a dot matches only the whole name. If
# several entries match, the entry with the most parts decides.
ENDS: Mapping[Role, tuple[str, ...]] = {
    "writes": (
        *("o_proj", "down_proj", "c_proj", "out_proj", "proj_down", "o_b_proj", "per_layer_projection"),
        *("dense", "dense2", "dense_4h_to_h", "fc2", "fc_out", "Wo", "wo", "w2", "w_out", "layer_2", "ffn.2"),
        *("output_linear", "linear_out", "linear_right", ".linear", "attention_out", "o_proj.linear"),
        *("SelfAttention.o", "EncDecAttention.o"),  # T5
        *("attention.output", "feed_forward.output", "feed_forward.value"),  # RWKV, ProphetNet
    ),
    "reads": (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "kv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
        *("q_proj.linear", "k_proj.linear", "v_proj.linear", "relative_position_bias.linear"),
        *("query_key_value", "query", "key", "value", "query_proj", "key_proj", "value_proj", "receptance"),
        *("Wqkv", "Wq", "Wk", "Wv", "q", "k", "v", "project_q", "project_k", "project_v", "c_attn"),
        *("v_proj_current", "v_proj_delayed", "relative_pos_embeddings", "r_proj", "sink_proj", "output_gate"),
        *("up_proj", "gate_proj", "gate_up_proj", "proj_up", "proj_up_gate", "gate_up_proj_adapter_list.*.0"),
        *("c_fc", "dense_h_to_4h", "dense1", "intermediate", "intermediate.dense", "fc1", "fc_in", "layer_1"),
        *(
            "Wi",
            "wi",
            "wi_0",
            "wi_1",
            "w1",
            "w3",
            "v1",
            "w_0",
            "w_1",
            "ffn.0",
            "input_linear",
            "linear_x",
            "linear_y",
            "linear_left",
        ),
        *("in_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_ba", "in_proj_a", "in_proj_b", "in_proj_z"),
        *("a_proj", "b_proj", "g_proj", "f_proj", "f_a_proj", "g_a_proj", "per_layer_input_gate"),
        *("igate_preact", "fgate_preact", "ogate_preact"),
    ),
    # Modules between a reader and a writer, and modules that select experts or attention keys.
    "inside": (
        *("q_b_proj", "kv_b_proj", "o_a_proj", "f_b_proj", "g_b_proj", "q_gate_proj", "x_proj", "dt_proj"),
        *("gate_up_proj_adapter_list.*.1", "sconv.weight_proj", "indexer.*", "scorer.*"),
        *("gate", "gate.*", "router", "router.*", "classifier", "shared_expert_gate", "modality_router"),
    ),
}
GROUPS: dict[str, Role] = {WRITERS: "writes", READERS: "reads"}
KEYS_AND_VALUES = {"kv": ("k_proj", "v_proj")}


@lru_cache(maxsize=4096)
def role_of(name: str) -> Role | None:
    """The role of a module, by its name relative to the decoder layer; None if the name is unknown."""
    name = name.removesuffix(".original_module")  # the suffix of a module that PEFT has copied for modules_to_save
    fitting: list[tuple[int, int, Role]] = [
        (end.count("."), len(end), role)
        for role, ends in ENDS.items()
        for end in ends
        if fnmatchcase(f".{name}", end if end.startswith(".") else f"*.{end}")
    ]
    return max(fitting)[2] if fitting else None


def is_called(name: str, target: str) -> bool:
    """Whether `target`, a group or the end of a name, matches a module; `name` is relative to the decoder layer."""
    if target == ALL_LINEAR:
        return last(name) != "lm_head"
    if target in GROUPS:
        return role_of(name) == GROUPS[target]
    return matches(name, KEYS_AND_VALUES.get(target, (target,)))


def fused_experts(layer: nn.Module) -> dict[str, Tensor]:
    """Weights of a decoder layer that hold all experts in one tensor, `(experts … …)` or `(experts·… …)`, by name."""
    linear, found = linear_modules(layer), {}
    for name, module in layer.named_modules():
        if name in linear or isinstance(module, BaseTunerLayer | nn.Embedding):
            continue
        own = "expert" in type(module).__name__.lower() or "experts" in name.split(".")
        for key, parameter in module.named_parameters(recurse=False) if own else ():
            if parameter.ndim > 1 and "bias" not in key:
                found[name if key == "weight" else f"{name}.{key}"] = parameter
    return found


def unknown(layer: nn.Module, width: int) -> list[str]:
    """Linear modules of a decoder layer that may read or write the residual stream but whose names are in no group."""
    return [
        name
        for name, module in linear_modules(layer).items()
        if role_of(name) is None and width in linear_shape(base_of(module))
    ]


def writer_names(layer: nn.Module, width: int) -> list[str]:
    """Linear modules and fused experts of a decoder layer that write to the residual stream.

    Raises:
        ValueError: there is no such module, or the layer has a module of unknown role.
    """
    names = [n for n in (*linear_modules(layer), *fused_experts(layer)) if role_of(n) == "writes"]
    others = unknown(layer, width)
    if others or not names:
        what = f"has modules of unknown role ({', '.join(others)})" if others else f"has none of {WRITERS!r}"
        raise ValueError(
            f"a {type(layer).__name__} {what}, so the output directions for {RESIDUAL!r} are not known; only shift "
            "the residual stream (rotate_input=False, shift=True) or adapt linear modules by name: "
            f"{', '.join(sorted(map(last, linear_modules(layer))))}"
        )
    return names
