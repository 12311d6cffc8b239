"""Text from any model: generation, stops, sampling, conversations, calibration. Must not know where experts are."""
