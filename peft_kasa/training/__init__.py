"""What happens at an optimiser's step: regularisers, float32 masters and learning rates by slot."""
