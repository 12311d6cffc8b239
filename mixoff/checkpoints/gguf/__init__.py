"""GGUF, the format of llama.cpp: one file, or a split set, with configuration, tokenizer and quantized weights."""
