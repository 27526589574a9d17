"""Token shards, packing, and a data order that is a pure function of seed and step."""
