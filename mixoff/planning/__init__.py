"""Where a model's bytes go on a machine, and how fast it may run: machines, budgets, needs, speed, plans.

Everything here is modelled or probed. Must not know tensors, transfers or the runtime.
"""
