"""From a checkpoint to a store, and from either to a `Source` of experts: layout, conversion, readers, verification.

A store is an ordinary model folder with the backbone (all that is not an expert), next to `experts-NNN.bin` (one file
per MoE layer, one aligned byte range per expert) and `mixoff.json`, which lists them.
"""
