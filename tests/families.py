"""Tiny random models of many families, for what must hold in all of them; nothing is downloaded."""

from typing import Any

import torch
import transformers as tf
from torch import nn

WIDTH, VOCABULARY = 32, 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
BART = {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
# By family: the prefix of the classes of transformers, and what its configuration needs beside or instead of `COMMON`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("Bamba", {**SSM, "attn_layer_indices": [1], "mamba_expand": 2}),
    "bart": ("Bart", {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3, **BART}),
    "biogpt": ("BioGpt", {}),
    "bitnet": ("BitNet", {}),
    "bloom": ("Bloom", {"n_head": 4}),
    "codegen": ("CodeGen", {"n_embd": WIDTH, "n_head": 4, "rotary_dim": 4, "n_inner": 48}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {**HEADS, "sliding_window": 8}),
    "ctrl": ("CTRL", {"n_embd": WIDTH, "dff": 48, "n_head": 4, "n_layer": 2}),
    "dbrx": (
        "Dbrx",
        {
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**MLA, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "deepseek-v3": ("DeepseekV3", {**MLA, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "deepseek-v4": (
        "DeepseekV4",
        {
            **ROUTED,
            "head_dim": 16,
            "q_lora_rank": 12,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": 8,
            "num_key_value_heads": 1,
            "hc_mult": 3,
            "partial_rotary_factor": 0.5,
        },
    ),
    "diffllama": ("DiffLlama", {}),
    "doge": ("Doge", {}),
    "ernie4.5": ("Ernie4_5", {**HEADS}),
    "exaone4": ("Exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "falcon": ("Falcon", {"multi_query": True}),
    "falcon-h1": ("FalconH1", {**SSM, "mamba_d_ssm": 64}),
    "falcon-mamba": ("FalconMamba", {"state_size": 8, "time_step_rank": 4}),
    "gemma": ("Gemma", HEADS),
    "gemma4": (
        "Gemma4Text",
        {
            **HEADS,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "sliding_window": 8,
            "global_head_dim": 8,
        },
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "intermediate_size": 48,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "glm": ("Glm", HEADS),
    "glm4": ("Glm4", HEADS),
    "glm4-moe": ("Glm4Moe", {**HEADS, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "gpt-bigcode": ("GPTBigCode", {"n_embd": WIDTH, "n_head": 4, "n_layer": 2}),
    "gpt-neo": ("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt-oss": (
        "GptOss",
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gptj": ("GPTJ", {"n_embd": WIDTH, "n_head": 4, "rotary_dim": 4, "n_layer": 2}),
    "granite": ("Granite", {}),
    "granite4-hybrid": (
        "GraniteMoeHybrid",
        {
            **SSM,
            "mamba_expand": 2,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 48,
            "num_local_experts": 0,
        },
    ),
    "granite-moe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("Helium", HEADS),
    "jamba": (
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_experts": 1,
            "use_mamba_kernels": False,
        },
    ),
    "jetmoe": (
        "JetMoe",
        {"kv_channels": 8, "num_local_experts": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    ),
    "kimi-linear": (
        "KimiLinear",
        {
            **MLA,
            **EXPERTS,
            "q_lora_rank": None,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_heads": 4,
            "linear_head_dim": 8,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "block_ff_dim": 48}),
    "lfm2-moe": ("Lfm2Moe", {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "llama4": (
        "Llama4Text",
        {
            **HEADS,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 16,
        },
    ),
    "longcat-flash": (
        "LongcatFlash",
        {
            **MLA,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 4,
            "zero_expert_num": 1,
            "moe_topk": 2,
            "head_dim": 8,
        },
    ),
    "mamba": ("Mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "minimax": (
        "MiniMax",
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "modernbert-decoder": ("ModernBertDecoder", {"cls_token_id": 1, "sep_token_id": 2}),
    "moshi": ("Moshi", {**HEADS, "ffn_dim": 48}),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}),
    "nemotron": ("Nemotron", HEADS),
    "nemotron-h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "head_dim": 8,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "olmo-hybrid": ("OlmoHybrid", DELTA),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "persimmon": ("Persimmon", {}),
    "phi": ("Phi", {}),
    "phimoe": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3-next": ("Qwen3Next", {**EXPERTS, **DELTA, **HEADS, "shared_expert_intermediate_size": 24}),
    "qwen3.5": ("Qwen3_5Text", {**DELTA, **HEADS}),
    "recurrent-gemma": (
        "RecurrentGemma",
        {**HEADS, "lru_width": WIDTH, "attention_window_size": 8, "num_hidden_layers": 3},
    ),
    "rwkv": ("Rwkv", {"attention_hidden_size": WIDTH}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": 8}),
    "t5": (
        "T5",
        {
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "xglm": ("XGLM", {"d_model": WIDTH, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2}),
    "zamba2": (
        "Zamba2",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
        },
    ),
}


def mllama() -> nn.Module:
    """A model of three layers, the middle one of which runs on images only."""
    text = {**COMMON, "vocab_size": 288, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {
        "hidden_size": 32,
        "attention_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }
    return tf.MllamaForConditionalGeneration(tf.MllamaConfig(text_config=text, vision_config=vision))


def _by_table(name: str, changes: dict[str, Any]) -> nn.Module:
    prefix, own = FAMILIES[name]
    config = getattr(tf, f"{prefix}Config")(**{**COMMON, **own, **changes})
    stem = prefix.removesuffix("Text")
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if config.is_encoder_decoder:
        heads = heads[::-1]
    return next(getattr(tf, stem + head) for head in heads if hasattr(tf, stem + head))(config)


def build(name: str, **changes: Any) -> nn.Module:
    """The same float32 weights each time, in evaluation mode; `changes` go to the configuration."""
    torch.manual_seed(0)
    model = mllama() if name == "mllama" else _by_table(name, changes)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim > 1 and "A_log" not in key:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()
