"""Our logical tensors as those of Hugging Face's models, and back; one file per architecture."""
