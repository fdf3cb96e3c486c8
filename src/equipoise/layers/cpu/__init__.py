"""The experts' matmuls on a CPU."""
