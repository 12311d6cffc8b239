"""From a checkpoint to a store: data-free, or calibrated on text so that outputs are kept rather than weights.

`convert` is the door; `streams` runs the original and the quantized model side by side, `weights` quantizes each matrix
for the inputs that it got, and `bits` divides a budget among layers and matrices.
"""
