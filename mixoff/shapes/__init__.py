"""What a model is made of: parameters by part, experts, the cache of keys and values, and their bytes under a scheme.

Must not know folders of weights, the Hub, or machines.
"""

from mixoff.shapes.config import skeleton as skeleton
