"""Checkpoints: native (PyTorch DCP) and Hugging Face form."""
