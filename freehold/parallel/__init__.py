"""How a model and its batches are sharded over processes; the model itself knows nothing about that."""
