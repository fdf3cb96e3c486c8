"""Attention, normalisation and cross-entropy as operators of their own: faster on a CPU than PyTorch's."""
