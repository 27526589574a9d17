"""gather: sources become documents with evidence of their licence."""
