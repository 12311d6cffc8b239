"""From a checkpoint to a store, and from either to a `Source` of experts: layout, conversion, readers, verification.

A store is an ordinary model folder with the backbone, which is all but the experts. These are in `experts-NNN.bin`, one
file per MoE layer with one aligned byte range per expert; `mixoff.json` lists them.
"""
