"""What this package calls a model."""

from peft import PeftModel
from transformers import PreTrainedModel

CausalLM = PreTrainedModel | PeftModel  # a causal language model, with or without adapters
