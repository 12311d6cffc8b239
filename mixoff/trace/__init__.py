"""Which experts routers asked for, and how caches serve that: traces, synthetic routers, replay, simulation.

Must not know torch, files of models, or the runtime.
"""

from mixoff.trace.trace import Trace as Trace
from mixoff.trace.trace import load_domains as load_domains
