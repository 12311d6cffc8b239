"""Bytes into slots: the `Transfer` protocol, its threads, the RAM tier, a device's copy stream, and slots as memory.

Must not know policies, models or plans.
"""
