#!/usr/bin/env python3
"""Predicts the speed of decoding on this machine, measures it, and writes both next to each other into docs/.

    python benchmarks/time_check.py measure FOLDER --part fitted --record A.json   # alone on the machine, two minutes
    python benchmarks/time_check.py fit FOLDER A.json                              # constants of speed.EFFICIENCY
    python benchmarks/time_check.py measure FOLDER --part held-out --record B.json
    python benchmarks/time_check.py table FOLDER A.json B.json                        # into docs/benchmarks.md
    python benchmarks/time_check.py overlay FOLDER --svg docs/overlay.svg             # one token, measured and modelled

FOLDER takes the stores: random weights of exact shapes, and the bundled model (5.5 GB). The settings of a part are
measured in turns: models stay loaded, in one process per memory limit, and every round probes the bandwidths and runs
each setting once. Between any two tokens a loop of Python tells how fast the core is just now. The simulator predicts
hit rates from the routing that the run will follow, and what the run then counts has to be equal.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from transformers import MixtralConfig

import _table
from mixoff import Scheme, convert, load, models
from mixoff.bench import limits, routing, synthetic
from mixoff.bench.compare import PASSIVE, environment
from mixoff.bench.spec import Spec
from mixoff.classroom import plots, table2
from mixoff.kernels import reference
from mixoff.kernels.cpu.threads import crew
from mixoff.planning import hardware, speed
from mixoff.planning import probe as probe_
from mixoff.planning.speed import WIDENED, Efficiency
from mixoff.shapes.config import configured_top_k as top_k
from mixoff.shapes.config import read_config
from mixoff.shapes.kv_cache import advance
from mixoff.shapes.shape import ModelShape
from mixoff.shapes.sites import slot_nbytes, torch_dtype
from mixoff.store import describe
from mixoff.store.readers import BLOCK, PIECE
from mixoff.store.source import open_source
from mixoff.trace.simulate import simulate
from mixoff.trace.trace import Trace
from mixoff.transfer.tiers import WORKERS

RUNS, TOKENS, PROMPT, WARMUP = 5, 12, 4, 24  # a first run of each setting is not counted
HICCUP = 3.0  # times the median of its run: tokens and loops so long say nothing of the core's usual speed
GIB = 1 << 30
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
MARKS = "<!-- measured: begin (benchmarks/time_check.py table) -->\n", "<!-- measured: end -->\n"
SMALL = {"vocab_size": 32000, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPES = {  # in addition to those of mixoff.bench.synthetic: mixtral-700m twice as deep, and with many small experts
    "deep": SMALL | {"intermediate_size": 3584, "num_hidden_layers": 16},
    "fine": SMALL | {"intermediate_size": 896, "num_hidden_layers": 8, "num_local_experts": 32,
                     "num_experts_per_tok": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One row. slots: a layer, None for all; ram: a RAM tier for all experts; limit: bytes of a control group."""

    model: str
    scheme: str
    threads: int = 1
    slots: int | None = None
    io: str = "buffered"
    prefetch: str = "none"
    prompt: int = PROMPT
    ram: bool = False
    limit: int | None = None
    fitted: bool = False

    @property
    def name(self):
        """As the table says it."""
        source = "RAM" if self.ram else {"direct": "the disk", "buffered": "the page cache"}[self.io]
        held = "resident" if self.slots is None else f"{self.slots} slots, misses from {source}"
        more = [f"prompt of {self.prompt}"] if self.prompt != PROMPT else []
        more += ["guesses"] if self.prefetch != "none" else []
        more += [f"in {self.limit / GIB:g} GiB"] if self.limit else []
        return ", ".join([f"{self.model} `{self.scheme}`", held, *more])


SETTINGS = [Setting(**row) for row in json.loads((Path(__file__).parent / "settings.json").read_text(encoding="utf-8"))]


# What is run ----------------------------------------------------------------------------------------------------------


def path_of(folder, setting):
    """The setting's store, made where it is missing."""
    path, model = Path(folder) / f"{setting.model}-{setting.scheme}", setting.model
    if model != "tiny":
        shape = MixtralConfig(**SHAPES[model]) if model in SHAPES else model
        return synthetic.write_store(shape, setting.scheme, path)
    if not path.exists():
        convert(models.path(), path, scheme=Scheme.preset(setting.scheme))
    return path


def sites_of(path):
    """Where the store's experts are, and the dtype of its files."""
    with closing(open_source(path)) as source:
        return source.sites, source.dtype


def spec_of(setting, path):
    """What a contender of `mixoff bench` is told: slots and scratch, not a byte more."""
    sites, dtype = sites_of(path)
    slots = len(sites) * (setting.slots or sites[0].num_experts)
    slots += 2 if setting.prefetch != "none" else 0  # spare ones
    torch.set_num_threads(setting.threads)  # on which it depends what scratch a BLAS leaves to fp16 weights
    scratch = reference.scratch_nbytes(sites, torch_dtype("float32" if dtype == "float16" else dtype))
    load = {"fast_bytes": slots * slot_nbytes(sites) + scratch + BLOCK}
    load |= {"io": setting.io, "prefetch": setting.prefetch} | ({"ram_bytes": 2 * GIB} if setting.ram else {})
    own = {"threads": setting.threads, "prompt_tokens": setting.prompt, "tokens": TOKENS, "warmup": WARMUP}
    return Spec(f"{setting.name}; {setting.threads}", "mixoff", str(path), runs=RUNS + 1, load=load, **own)


def routed(spec):
    """Choices (T, L, K) that the run will follow, and guesses: every expert once, then a synthetic router's."""
    sites, K = sites_of(spec.path)[0], top_k(read_config(Path(spec.path)))
    E, L = sites[0].num_experts, len(sites)
    length = PROMPT + spec.warmup + spec.runs * (spec.prompt_tokens + spec.tokens)
    trace = routing.synthetic(spec.routing, spec.repeat, E, K, L, length)
    trace = np.concatenate([routing.every_expert(E, K, L), trace])[:length]
    return trace, routing.guessed(trace, E, spec.recall), E


def expected(setting, spec):
    """Hit rate of the cache alone, of cache and guesses, and the guesses' recall, after the warm-up: simulated."""
    trace, guesses, E = routed(spec)
    guesses[:, 0] = -1  # no router is asked before the first layer's
    before, turn = [True] * PROMPT + [False] * spec.warmup, [True] * spec.prompt_tokens + [False] * spec.tokens
    whole = Trace.from_array(trace, E, is_prompt=np.array(before + spec.runs * turn), predicted=guesses)
    parts = whole, whole.select(slice(0, len(before)))
    done, warm = (simulate(t, "lru", setting.slots or E, prefetch=setting.prefetch) for t in parts)
    hits, misses, used = (getattr(done, n) - getattr(warm, n) for n in ("hits", "misses", "prefetch_hits"))
    asked, lacked = hits + misses, misses + used
    recall = None if setting.prefetch == "none" else used / lacked
    return {"cached": 1 - lacked / asked, "hit_rate": hits / asked, "recall": recall}


# Measuring ------------------------------------------------------------------------------------------------------------


class Runner:
    """A contender of `mixoff bench`, in this process, that looks at the core's speed between tokens."""

    def __init__(self, spec):
        torch.set_num_threads(spec.threads)
        self.spec, self.model, self.cache = spec, load(spec.path, **spec.load), None
        routing.Routing(self.model, *routed(spec)[:2])
        ids = torch.from_numpy(spec.ids(self.model.config.vocab_size))
        self.rows = iter(ids)
        self.step(ids[0, :PROMPT], restart=True)
        for token in ids[0].repeat(spec.warmup)[: spec.warmup]:
            self.step(token[None])
        self.model.mixoff.reset_counts()

    def step(self, ids, restart=False):
        """Seconds of a pass."""
        start = time.perf_counter()
        _, self.cache = advance(self.model, ids[None], None if restart else self.cache, logits_to_keep=1)
        return time.perf_counter() - start

    def run(self):
        """A prompt and tokens after it: seconds of each, and of the loop's step before and after each."""
        torch.set_num_threads(self.spec.threads)
        row = next(self.rows)
        self.step(row[: self.spec.prompt_tokens], restart=True)
        seconds, loops = [], [python_speed(self.spec.threads)]
        for token in row[self.spec.prompt_tokens :]:
            seconds.append(self.step(token[None]))
            loops.append(python_speed(self.spec.threads))
        return {"token_s": seconds, "python_s": loops, "hit_rate": self.model.mixoff.info().hit_rate}


def python_speed(threads):
    """`probe.python_speed` of the slowest of the threads that share products."""
    if threads == 1:
        return probe_.python_speed()
    found = []
    crew(threads).share(lambda first, last: found.append(probe_.python_speed()), threads)
    return max(found)


def serve(specs):
    """Worker: load every model, then run those that standard input names, one a line."""
    with torch.inference_mode():
        runners = [Runner(Spec.from_json(text)) for text in specs]
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(runners[int(line)].run()), flush=True)


@contextmanager
def worker(limit, specs):
    """A process that has some settings' models loaded, inside a memory limit or none; yields its `run(at)`."""
    with limits.limit(limit) if limit else nullcontext() as inside:
        for path in {spec.path for spec in specs} if limit else ():
            limits.forget(Path(path))
        words = [*(inside.words if limit else ()), sys.executable, __file__, "serve"]
        words += [spec.to_json() for spec in specs]
        env, pipe = environment(max(spec.threads for spec in specs), **PASSIVE), subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env) as process:
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"a worker with the limit {limit} ended early")

            def run(at):
                """One run of the setting at that place."""
                print(at, file=process.stdin, flush=True)
                return json.loads(process.stdout.readline())

            yield run


def measure(folder, settings):
    """Runs by setting, what was expected of each, and the bandwidths of each round."""
    specs = [spec_of(s, path_of(folder, s)) for s in settings]
    if hasattr(os, "sync"):
        os.sync()  # a disk that still writes stores reads slower than its probe
    probes, runs = [], [[] for _ in settings]
    groups = {limit: [i for i, s in enumerate(settings) if s.limit == limit] for limit in {s.limit for s in settings}}
    with ExitStack() as stack:
        workers = {limit: stack.enter_context(worker(limit, [specs[i] for i in own])) for limit, own in groups.items()}
        for turn in range(RUNS + 1):
            probes.append(probe(folder, {s.threads for s in settings}))
            for limit, own in groups.items():
                for at, i in enumerate(own):
                    runs[i].append(workers[limit](at))
            print(f"round {turn}: {probes[-1]}", file=sys.stderr, flush=True)
    rows = zip(settings, specs, runs, strict=True)
    return {
        "probes": probes,
        "rows": [{"setting": asdict(s), "runs": run[1:], "expected": expected(s, spec)} for s, spec, run in rows],
    }


def probe(folder, threads):
    """Bytes a second: of memory by threads, of the disk."""
    found = {str(n): probe_.read_bandwidth(n, nbytes=GIB // 2, rounds=2) for n in threads}
    return found | {"disk": probe_.disk_bandwidth(folder, PIECE, WORKERS, nbytes=GIB // 4)}


# Both next to each other ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A setting, its runs' tokens/s and their seconds a token without hiccups, and what goes into a prediction."""

    setting: Setting
    shape: ModelShape
    expected: dict
    counted: float
    speeds: list[float]
    seconds: list[float]
    machines: list[hardware.Hardware]

    def predict(self, machine, efficiency=None):
        """Of one token on that machine."""
        s = self.setting
        ram_share = 1.0 if s.ram or s.io == "buffered" else 0.0
        rates = {"recall": self.expected["recall"], "ram_share": ram_share, "efficiency": efficiency}
        return speed.predict(self.shape, s.scheme, machine, self.expected["cached"], **rates)

    @property
    def machine(self):
        """As it was in the median run."""
        return replace(self.machines[0], python_s=statistics.median(m.python_s for m in self.machines))


def rows_of(folder, files):
    """Rows of recorded measurements."""
    for file in files:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        for row in record["rows"]:
            setting = Setting(**{f.name: row["setting"][f.name] for f in fields(Setting)})
            shape = describe.shape_of(str(path_of(folder, setting)))
            machines = [machine(record["probes"], setting.threads, run) for run in row["runs"]]
            speeds = [len(run["token_s"]) / sum(run["token_s"]) for run in row["runs"]]
            usual = [np.array(run["token_s"]) for run in row["runs"]]
            seconds = [float(t[t < HICCUP * np.median(t)].mean()) for t in usual]
            yield Row(setting, shape, row["expected"], row["runs"][-1]["hit_rate"], speeds, seconds, machines)


def machine(probes, threads, run):
    """This machine in a run: the best of the memory's probes, the disk's median one, and how fast the core was."""
    loops = np.array(run["python_s"])
    return replace(
        hardware.NAMED["laptop"],
        name="here",
        threads=threads,
        python_s=float(np.minimum(loops, HICCUP * np.median(loops)).mean()),
        fast_Bps=max(p[str(threads)] for p in probes),
        disk_Bps=statistics.median(p["disk"] for p in probes),
    )


FREE = {  # what is fitted, and about where it should lie
    "token_s": 2e-3, "layer_s": 0.8e-3, "expert_s": 0.1e-3, "miss_s": 0.1e-3, "shared_s": 0.5e-3, "cold_s": 0.5e-3,
    2: 0.6, 4: 0.6, 16: 0.4, WIDENED: 0.1, "fixed_slows": 0.75, "products_slow": 0.3,
}  # fmt: skip
PULL, TYPICAL = 0.1, 0.05  # of that guess; error of a run above which it counts less than its square


def efficiency_of(x):
    """Parameters, as logarithms, in the model's words; formats that were not measured as the nearest one."""
    value = dict(zip(FREE, np.exp(x).tolist(), strict=True))
    shares = {2: value[2], 3: value[2], 4: value[4], 8: value[4], 16: value[16], 32: 0.5, WIDENED: value[WIDENED]}
    own = {name: value[name] for name in FREE if isinstance(name, str) and name != WIDENED}
    return Efficiency(shares, source="fitted", guess_s=0.1e-3, python_s=speed.STEP_S, **own)


def fit(rows):
    """The constants that explain the runs of the fitted rows best."""
    rows, guess = [row for row in rows if row.setting.fitted], np.log([*FREE.values()])

    def misfit(x):
        made = efficiency_of(x)
        pairs = [(row, m, t) for row in rows for m, t in zip(row.machines, row.seconds, strict=True)]
        errors = np.log([row.predict(m, made).seconds / t for row, m, t in pairs])
        robust = np.sign(errors) * np.sqrt(2 * TYPICAL * (np.hypot(TYPICAL, errors) - TYPICAL))
        return np.concatenate([robust, PULL * (x - guess)])

    return efficiency_of(table2.least_squares(misfit, guess, 40))


def table(rows):
    """Markdown, held-out rows first."""
    names = ["setting", "threads", "hit rate (modelled; counted)", "core, times its best (measured)"]
    names += ["memory, disk, GB/s (measured)", "tokens/s (modelled)", "tokens/s (measured: median; min to max)"]
    ordered = sorted(rows, key=lambda row: row.setting.fitted)
    return _table.table([*names, "modelled / measured"], map(cells, ordered))


def cells(row):
    """One setting."""
    m, speeds = row.machine, row.speeds
    median, made = statistics.median(speeds), row.predict(m).tokens_per_s
    yield row.setting.name + (" (fitted)" if row.setting.fitted else "")
    yield row.setting.threads
    yield f"{row.expected['hit_rate']:.3f}; {row.counted:.3f}"
    yield f"{m.python_s / speed.STEP_S:.2f}"
    yield f"{m.fast_Bps / 1e9:.1f}, {m.disk_Bps / 1e9:.1f}"
    yield f"{made:.1f}"
    yield f"{median:.1f}; {min(speeds):.1f} to {max(speeds):.1f}"
    yield f"{made / median:.2f}"


# One token ------------------------------------------------------------------------------------------------------------
# Both time lines come from events of one kind: measured ones as the runtime reported them, modelled ones of
# `speed.predict(...).step`, with attention, which the runtime does not report.

LAYERS, MISSES = 4, 4  # layers that are drawn, and misses in them


def first_layers(events):
    """Events of the first layers, from the moment when the first of them begins."""
    events = [e for e in events if e.layer < LAYERS and e.kind in ("miss", "compute") and e.phase == "decode"]
    return events, min(e.t0 for e in events)


def misses(events):
    """Events that are misses."""
    return [e for e in events if e.kind == "miss"]


def shifted(events, start):
    """The same events, counted from `start`."""
    return [replace(e, t0=e.t0 - start, t1=e.t1 - start) for e in events]


def measured_token(runner):
    """Events of the token of median length among those that missed as often as the modelled one; the loops' seconds."""
    tokens, told = {}, []
    runner.model.mixoff.on_event(told.append)
    loops = [loop for _ in range(3) for loop in runner.run()["python_s"]]
    for event in told:
        if event.phase == "decode":
            tokens.setdefault(event.token, []).append(event)
    alike = [shifted(*line) for line in map(first_layers, tokens.values()) if len(misses(line[0])) == MISSES]
    alike.sort(key=lambda events: max(e.t1 for e in events))
    return alike[len(alike) // 2], loops


def modelled_token(step):
    """Events of a token that misses as often; its first attention ends where the measured token begins."""
    for seed in range(1000):
        events, _ = first_layers(step.events(seed=seed))
        if len(misses(events)) == MISSES:
            return shifted(events, step.attention_s)
    raise SystemExit(f"no token of the model misses {MISSES} times in {LAYERS} layers")


def overlay(folder, svg):
    """Draws a token of a runtime that reads its misses from the disk above the same token as the time model has it."""
    setting = next(s for s in SETTINGS if s.model == "mixtral-700m" and s.slots == 3)
    path = path_of(folder, setting)
    with torch.inference_mode():
        runner = Runner(spec_of(setting, path))
        runner.run()
        told, loops = measured_token(runner)
    here = machine([probe(folder, {1})], 1, {"python_s": loops})
    cached = runner.model.mixoff.info().hit_rate
    made = modelled_token(speed.predict(describe.shape_of(str(path)), setting.scheme, here, cached).step)
    draw(told, made, svg)
    for name, events in {"measured": told, "modelled": made}.items():
        copies = [e.t1 - e.t0 for e in misses(events)]
        ms = 1e3 * max(e.t1 for e in events), 1e3 * statistics.mean(copies)
        print(f"{name}: {LAYERS} layers with {MISSES} misses {ms[0]:.1f} ms, a miss on the link {ms[1]:.2f} ms")


def draw(told, made, svg):
    """Two charts with one axis of time."""
    _table.use_svg()
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True, layout="constrained")
    plots.gantt(told, axes[0], f"measured: {LAYERS} layers of mixtral-700m, 3 slots, misses from the disk", False)
    plots.gantt(made, axes[1], "modelled")
    axes[0].set_xlabel("")
    axes[0].set_xlim(left=min(0.0, *(1e3 * e.t0 for e in made)) - 0.3)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), ncols=5, loc="outside lower center", frameon=False)
    _table.save_svg(fig, svg)


def main():
    """One of the four steps."""
    parser = _table.parser(__doc__)
    parser.add_argument("what", choices=["measure", "fit", "table", "overlay"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--part", choices=["fitted", "held-out"])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--svg", default="docs/overlay.svg")
    args = parser.parse_args()
    if args.what == "overlay":
        return overlay(args.folder, args.svg)
    if args.what == "measure":
        settings = [s for s in SETTINGS if args.part is None or s.fitted == (args.part == "fitted")]
        args.record.write_text(json.dumps(measure(args.folder, settings)), encoding="utf-8")
        args.files = [args.record]
    rows = list(rows_of(args.folder, args.files))
    if args.what == "fit":
        print(fit(rows))
    elif args.what == "measure":
        print(table(rows))
    else:
        _table.write_between(args.page, *MARKS, table(rows))


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
