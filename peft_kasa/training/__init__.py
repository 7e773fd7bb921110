"""What happens at an optimiser's step: regularisers and float32 masters."""
