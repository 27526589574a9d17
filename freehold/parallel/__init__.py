"""How a model and its batches are spread over processes; the model itself knows nothing of it."""
