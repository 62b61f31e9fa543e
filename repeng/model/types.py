"""Type aliases for models."""

from peft import PeftModel
from transformers import PreTrainedModel

CausalLM = PreTrainedModel | PeftModel  # a causal language model, with or without adapters
