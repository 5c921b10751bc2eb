"""Model cards: the template, and one card per reference model."""
