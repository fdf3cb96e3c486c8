"""What LLaMA-Factory imports at its head and text never uses: torchaudio comes with CUDA alone."""

__version__ = "2.11.0"
