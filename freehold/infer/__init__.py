"""Ids in, ids out: cache, sampler and engine, which know no text; and llama.cpp in a process of its own."""
