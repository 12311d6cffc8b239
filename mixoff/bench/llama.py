"""llama.cpp as a contender: `python -m mixoff.bench.llama SPEC` prints one JSON object, as `contender` does.

Runs in an environment with llama-cpp-python, through its ctypes layer, and loads nothing else of mixoff. The chosen
experts are read in a separate context, after the clock has stopped.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mixoff.bench import limits
from mixoff.bench.spec import Spec, repeat_rate

CONTEXT = 1024  # tokens of the KV cache
LOOKED_AT = 24  # tokens whose experts are recorded


class Llama:
    """A model file and one context. `repack` in `spec.load` lets llama.cpp repack weights in memory (its default)."""

    def __init__(self, spec: Spec) -> None:
        import llama_cpp as L

        self.L = L
        self.lines: list[bytes] = []
        self.log = L.llama_log_callback(lambda level, text, data: self.lines.append(text))
        L.llama_log_set(self.log, ctypes.c_void_p(0))
        L.llama_backend_init()
        params = L.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, spec.load.get("repack", True)
        self.model = L.llama_model_load_from_file(spec.path.encode(), params)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {spec.path}: {b''.join(self.lines[-3:]).decode(errors='replace')}")
        self.threads = spec.threads
        self.context = self.new_context()

    def new_context(self, callback: Any = None) -> object:
        """A context with its own KV cache; `callback` receives the tensors of the graph."""
        params = self.L.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = self.threads
        if callback is not None:
            params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
        return self.L.llama_init_from_model(self.model, params)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens that the model knows."""
        return self.L.llama_vocab_n_tokens(self.L.llama_model_get_vocab(self.model))

    def decode(self, ids: np.ndarray, context: object = None) -> float:
        """Run `ids` (T,) as the next tokens; returns seconds."""
        context = context or self.context
        tokens = (self.L.llama_token * len(ids))(*ids.tolist())
        start = time.perf_counter()
        if self.L.llama_decode(context, self.L.llama_batch_get_one(tokens, len(ids))):
            sys.exit("llama.cpp could not decode")
        logits = np.ctypeslib.as_array(self.L.llama_get_logits_ith(context, -1), shape=(self.vocabulary,))
        seconds = time.perf_counter() - start
        if not np.isfinite(logits).all():
            sys.exit("llama.cpp's logits are not finite: the file's weights are damaged")
        return seconds

    def clear(self) -> None:
        """Empty the KV cache, so that the next tokens start a new sequence."""
        self.L.llama_memory_clear(self.L.llama_get_memory(self.context), True)


def run(spec: Spec) -> dict:
    """Load and measure, as `contender.run` does."""
    with limits.Peak() as peak:
        start = time.perf_counter()
        llama = Llama(spec)
        report = {"load_s": time.perf_counter() - start, "loaded_bytes": limits.process_nbytes()}
        ids = spec.ids(llama.vocabulary)
        llama.decode(ids[0, :4])
        for token in ids[0, 4 : 4 + spec.warmup]:
            llama.decode(token[None])
        runs = [_run(llama, row, spec.prompt_tokens) for row in ids]
    return {
        **asdict(spec),
        **report,
        **{key: [r[key] for r in runs] for key in runs[0]},
        "repeat_rate": _repeat_rate(llama, ids[0, : min(spec.tokens, LOOKED_AT)]),
        "peak_bytes": peak.nbytes,
        "touched_bytes": touched_nbytes(spec.path),
        "versions": {"llama-cpp-python": llama.L.__version__},
    }


def touched_nbytes(path: str) -> int:
    """Bytes of weights in the file that one token of decoding reads."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    used, experts = (reader.fields[f"llama.expert_{name}"].contents() for name in ("used_count", "count"))
    sizes = {t.name: t.n_bytes for t in reader.tensors if t.name != "token_embd.weight"}
    return sum(int(size * used / experts) if "_exps" in name else int(size) for name, size in sizes.items())


def _run(llama: Llama, ids: np.ndarray, prompt_tokens: int) -> dict:
    llama.clear()
    read_before = limits.read_nbytes()
    prompt_s = llama.decode(ids[:prompt_tokens])
    read_between = limits.read_nbytes()
    token_s = [llama.decode(token[None]) for token in ids[prompt_tokens:]]
    return {
        "prompt_s": prompt_s,
        "token_s": token_s,
        "prompt_read_bytes": limits.difference(read_between, read_before),
        "read_bytes": limits.difference(limits.read_nbytes(), read_between),
    }


def _repeat_rate(llama: Llama, ids: np.ndarray) -> float | None:
    """Share of experts that the previous token used too, over tokens decoded one by one."""
    base = ctypes.CDLL(str(Path(llama.L.__file__).parent / "lib" / "libggml-base.so"))
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    chosen: list[tuple[int, int]] = []

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def look(tensor: int, asking: bool, data: object) -> bool:
        wanted = base.ggml_get_name(tensor).startswith(b"ffn_moe_topk")
        if wanted and not asking:
            two = (ctypes.c_int32 * 2)()
            base.ggml_backend_tensor_get(tensor, two, 0, ctypes.sizeof(two))
            chosen.append(tuple(two))
        return wanted if asking else True

    llama.L.llama_free(llama.context)
    llama.context = llama.new_context(look)
    for token in ids:
        llama.decode(token[None])
    return repeat_rate(np.array(chosen).reshape(len(ids), -1, 2))


if __name__ == "__main__":
    print(json.dumps(run(Spec.from_json(sys.argv[1]))))
