"""Which expert is in which slot, and which is evicted first: keys and slots only.

Must not know tensors, files, time or traces.
"""

from mixoff.cache.cache import ExpertCache as ExpertCache
from mixoff.cache.events import CacheInfo as CacheInfo
from mixoff.cache.events import Event as Event
