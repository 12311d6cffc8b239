"""Text from any model: generation, stops, sampling, conversations. Must not know where experts are."""
