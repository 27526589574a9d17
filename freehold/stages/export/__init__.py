"""Export: Hugging Face form and GGUF, proven against the model or refused."""
