"""Tiny random models of today's architectures, built from configurations; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn

WIDTH, DEPTH, VOCABULARY = 32, 3, 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GEMMA = {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 8}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """How to build one, linear sites that every layer has, and whether its experts are fused."""

    build: Callable[[], nn.Module]
    linear: tuple[str, ...]
    fused_experts: bool = False


def gemma3_multimodal() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=GEMMA, vision_config=vision, mm_tokens_per_image=1, image_token_index=60)
    )


LLAMA_SITES = ("q_proj", "v_proj", "down_proj")
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), LLAMA_SITES),
    "llama-bias-tied": Architecture(
        lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        ),
        LLAMA_SITES,
    ),
    "mistral-window": Architecture(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=8)), ("k_proj", "v_proj", "up_proj")
    ),
    "qwen2": Architecture(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=2)), LLAMA_SITES),
    "qwen3": Architecture(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)), LLAMA_SITES),
    "smollm3": Architecture(lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**GROUPED)), LLAMA_SITES),
    "olmo2": Architecture(lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES, num_key_value_heads=2)), LLAMA_SITES),
    "gemma2": Architecture(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA)), LLAMA_SITES),
    "gemma3-text": Architecture(lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA)), LLAMA_SITES),
    "gemma3-multimodal": Architecture(gemma3_multimodal, LLAMA_SITES),
    "phi3": Architecture(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, num_key_value_heads=2)),
        ("qkv_proj", "o_proj", "gate_up_proj"),
    ),
    "gpt2": Architecture(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_layer=DEPTH,
                n_head=4,
                n_positions=128,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ),
        ("c_attn", "c_fc"),
    ),
    "neox": Architecture(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)), ("query_key_value", "dense_4h_to_h")
    ),
    "mixtral": Architecture(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERTS, num_local_experts=4)), ("q_proj", "o_proj"), True
    ),
    "qwen3-moe": Architecture(
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True)
        ),
        ("k_proj", "o_proj"),
        True,
    ),
}
KINDS = ("linear", "residual", "mixed")


def build(name: str) -> nn.Module:
    """The same float32 weights each time, with biases that are not zero; evaluation mode."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def targets(name: str, kind: str) -> list[str]:
    """`target_modules` of an adapter of this kind."""
    linear = list(ARCHITECTURES[name].linear)
    return {"linear": linear, "residual": ["residual"], "mixed": ["residual", linear[0]]}[kind]
