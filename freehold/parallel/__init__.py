"""How a run is spread over processes, and how it survives losing them."""
