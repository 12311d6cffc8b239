"""A model and a runtime put together and taken apart: load, offload, restore, and what stock tools may not do."""
