"""What fewer bits or fewer experts cost: perplexity, divergence, and the knobs that trade exactness for speed."""
