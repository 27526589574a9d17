"""Ids in, ids out: cache, sampler and engine. Knows no text."""
