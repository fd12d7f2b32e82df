"""How matrices are stored in memory and in checkpoints, loaded and multiplied."""
