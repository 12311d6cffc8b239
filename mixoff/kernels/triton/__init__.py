"""Products on a GPU, in Triton: `tiles` describes them, `loops` holds the kernels, `strided` the published layout's."""
