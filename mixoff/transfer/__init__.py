"""Bytes into slots: the `Transfer` protocol, its threads, the RAM tier, a device's copy stream, and the slots.

Must not know policies, models or plans.
"""
