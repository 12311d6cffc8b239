"""Executes the PTX that Triton emits, on a CPU: what its interpreter cannot show, layouts and barriers, is checked too.

`code` reads the text, `memory` checks each access, `machine` runs all lanes of all programs together, `operations` says
what an instruction computes, and `launches` puts it in place of a card.
"""
