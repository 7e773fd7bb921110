"""The base layer's weight: however it is stored, wherever it is kept."""
