"""What a model is made of: parameters by part, experts, the KV cache, and their bytes under a scheme."""

from mixoff.shapes.config import skeleton as skeleton
