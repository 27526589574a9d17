"""CPU kernels in C++ as PyTorch operators: what the model and Muon are made of where a compiler is at hand."""
