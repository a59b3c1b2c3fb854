"""Models fine-tuned for the classification of texts and of pairs of texts."""
