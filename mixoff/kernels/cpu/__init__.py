"""Products on a CPU: compiled loops over packed weights, and the threads that run them.

`products` chooses, `loops` computes, `simd` names the instructions, `threads` and `relay` wake helpers faster than a
system call would (50 to 100 us), `strided` reads the published layout.
"""
