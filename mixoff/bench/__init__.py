"""Speed of models on this machine, beside what its memory and disk allow.

`budgets` measures the bundled model by budget. `compare` measures any store, its ablations and its peers in turns, each
run in a process of its own (`contender`, `llama`), under a real memory limit if asked (`limits`). `routing` makes
models with random weights choose experts as a trace says; `gguf_file` writes llama.cpp's file of a shape.

Light to import: `llama` runs in an environment of its own, where torch may be missing. Does not know the command line.
"""
