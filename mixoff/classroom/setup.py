"""One call at the top of each chapter, the same at home and on Colab, safe to repeat.

Does not know which chapter it is in.
"""

from __future__ import annotations

import os


def setup(threads: int = 1, seed: int = 0, gpu: bool = True) -> None:
    """Makes what follows repeatable and quiet: one thread, seeded generators, no progress bars, one look for figures.

    One thread is as fast as two for the small models of the course, and sums run in the same order on every machine.
    gpu: whether torch may see one; chapters that load a model say no, so that they count and print the same on Colab.
    Call it before torch is imported, or the order of sums is the processor's own.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warn about forks on stderr
    # processors with and without AVX-512 would sum in other orders; these two keep to what both have, as fast here
    os.environ.setdefault("MKL_CBWR", "AVX2")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from transformers.utils import logging

    from mixoff.classroom.plots import use_style

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    use_style()
    print("mixoff is ready")
