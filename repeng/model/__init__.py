"""The base model: its layers and sites, hidden states, log-probabilities, tokens, generation, loading."""
