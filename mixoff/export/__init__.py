"""From a store or a checkpoint to files for other engines: safetensors as on the Hub, compressed-tensors, GGUF.

`names` finds the Hub's names, `hub`, `compressed` and `gguf` lay out files, and `run` writes them with the machinery of
a conversion: resumable, and complete or not there.
"""
