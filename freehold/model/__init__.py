"""AFMoE on one device: plain PyTorch that knows no files, no ranks and no text."""
