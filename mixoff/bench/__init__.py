"""Speed of models on this machine, next to what its memory and disk allow.

`budgets` measures the bundled model by budget. `compare` measures any store, its ablations and its peers in turns, each
run in its own process (`contender`, `llama_bench`), under a real memory limit if requested (`limits`). `routing` makes
models with random weights choose the experts of a trace; `gguf_file` writes a file of a shape for llama.cpp.
"""
