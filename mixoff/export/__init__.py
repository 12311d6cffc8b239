"""From a store or a checkpoint to files for other engines: safetensors as on the Hub, compressed-tensors, GGUF.

`stored` reads a store as a checkpoint of 16-bit weights, `names` finds the Hub's names, `hub`, `compressed` and `gguf`
lay out files, and `run` writes them with the machinery of a conversion: resumable, and complete or not there.
"""
