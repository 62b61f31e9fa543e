"""Publishing on the Hugging Face hub: model cards, and the files of a repository."""
