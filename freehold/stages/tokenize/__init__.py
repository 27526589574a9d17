"""Documents to token ids: trains the tokenizer, writes shards with a document index."""
