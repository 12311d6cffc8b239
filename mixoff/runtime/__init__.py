"""From a token to its output: experts served to transformers from a cache; loading and offloading models."""
