"""Reading and writing Hugging Face checkpoint directories."""
