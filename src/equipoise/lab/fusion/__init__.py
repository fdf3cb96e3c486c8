"""Text and images as one sequence of tokens: a small early-fusion transformer, experts by modality (MoMa)."""
