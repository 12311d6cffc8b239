"""GGUF, the format of llama.cpp: one file, or a split set, that holds configuration, tokenizer and quantized weights."""
