"""Small diffusion transformers on images, side by side: experts that choose from pools, and tokens that choose."""
