"""Text from any model: generation, stops, sampling, conversations, windows to choose by. Must not know where experts are."""
