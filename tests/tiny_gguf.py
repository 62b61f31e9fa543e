"""A tiny model as a GGUF file of float32 weights, for transformers and for llama.cpp; no tokenizer."""

import gguf
from transformers.pytorch_utils import Conv1D

from repeng.export.gguf import Names


def write_base(model, path):
    """The whole model; the scale of a head's rotation and all else that a configuration says is in the metadata."""
    names, config = Names(model), model.config
    writer = gguf.GGUFWriter(str(path), names.architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    if names.architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_rope_dimension_count(head)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if names.architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if names.architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kinds = gguf.GGUFValueType
    writer.add_key_value("repeng.test.numbers", [3, 1, 2], kinds.ARRAY, sub_type=kinds.UINT16)
    writer.add_array("repeng.test.words", ["one", "two"])
    table = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == names.architecture),
        config.num_hidden_layers,
    )
    for key, parameter in model.named_parameters():
        module, _, kind = key.rpartition(".")
        name = f"{table.get_name(module)}.{kind}"
        weight = parameter.detach().float()
        if isinstance(model.get_submodule(module), Conv1D) and weight.ndim > 1:
            weight = weight.mT
        if names.architecture.startswith("gemma") and "norm" in name:
            weight = weight + 1
        rows = names.rows(name, weight[:, None] if weight.ndim == 1 else weight)
        writer.add_tensor(name, rows.reshape(weight.shape).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
