"""From a store to a smaller one: some experts of each layer leave, the others stay as they are or are merged.

`prune` is the door; `routers` finds the rows of a router and takes some away, `choose` says which experts stay, and
`layout` lays out the files. It is a room of its own because it needs both ends: a loaded model that reads a text, as
`quality` does, and the machinery that writes stores, which `quality` must not know.
"""
