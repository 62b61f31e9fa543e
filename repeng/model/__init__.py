"""The base model: layers and sites, hidden states, log-probabilities, tokens, generation and loading."""
