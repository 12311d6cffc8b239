"""From a configuration to what lies where and how fast it may be: machines, budgets, needs, speed, plans.

Everything here is modelled or probed. Must not know tensors, transfers or the runtime.
"""
