"""One call at the top of each chapter, the same at home and on Colab, safe to repeat."""

from __future__ import annotations

import os


def setup(threads: int = 1, seed: int = 0, gpu: bool = True) -> None:
    """Make a chapter repeatable and quiet: seeded generators, one style of figures, bars for downloads alone.

    Call it before torch is imported; otherwise the order of sums depends on the processor.

    threads: threads of torch; one is as fast as two for small models, and sums in the same order on every machine.
    seed: random seed of torch.
    gpu: whether torch may use a GPU; chapters that load a model pass False, so that they print the same on Colab.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise tokenizers warn about forks on stderr
    # processors with AVX-512 would sum in another order; AVX2 is on all of them, and as fast here
    os.environ.setdefault("MKL_CBWR", "AVX2")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    from mixoff.classroom.plots import use_style

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()  # of downloads, which last minutes; the line before turns off both
    use_style()
    print("mixoff is ready")
