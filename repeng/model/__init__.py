"""The base model: its layers and sites, hidden states, log-probabilities, generation, loading and adapter files."""
