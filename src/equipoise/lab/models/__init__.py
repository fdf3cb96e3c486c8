"""The lab's own transformer, and models of Hugging Face: made, loaded and exported."""
