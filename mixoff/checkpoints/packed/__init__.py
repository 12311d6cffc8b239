"""Checkpoints of other quantizers, decoded while they are read: GPTQ, AWQ, compressed-tensors, bitsandbytes, modelopt.

`matrix` is what all encodings share, `integers` and `floats` decode, `checkpoints` find the tensors of each weight.
"""
