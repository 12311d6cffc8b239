"""Checks of exercises, one module per chapter: `check.name(fn)` prints one line about a learner's function.

    [ .. ] not attempted yet
    [ ok ] 6 cases
    [FAIL] case 5: 1, expected 2
           call     lru_hits([1, 2, 1, 3, 1, 2], 2)
           returned 1
           expected 2
           This is FIFO: a hit must renew the expert's age.

`check.name.mine(fn, solution)` returns the learner's function once it passes. A check never raises.
"""
# ruff: noqa: F401 (chapters import these names as `check.name`)

from mixoff.classroom.checks.ch00 import copy_s_per_token, lru_hits, slots_per_layer
from mixoff.classroom.checks.ch01 import moe_layer, repeat_rate, route
from mixoff.classroom.checks.ch02 import kv_nbytes, parameters, stored_nbytes
from mixoff.classroom.checks.ch03 import bits_per_weight, pack, quantize_group, unpack
from mixoff.classroom.checks.ch04 import best_zero, fit, threshold, unit_gain
from mixoff.classroom.checks.ch05 import paired, perplexity, worth_having
from mixoff.classroom.checks.ch06 import bytes_per_token, make_cache, read_expert
from mixoff.classroom.checks.ch07 import guess_gain, layer_s, serve
from mixoff.classroom.checks.ch08 import belady_victim, fifo_misses, gap_closed, victim
from mixoff.classroom.checks.ch09 import hit_rate, residents, stays
from mixoff.classroom.checks.ch10 import gain, hit_rate_for, token_s
from mixoff.classroom.checks.ch11 import codes_at, folded, instructions_per_weight, matvec
from mixoff.classroom.checks.ch12 import by_expert, chunked, dropped, experts_touched
from mixoff.classroom.checks.ch13 import distil_loss, dynamic_top_k, greedy, skip_misses
from mixoff.classroom.checks.ch14 import break_even, exchanged, placed
from mixoff.classroom.checks.ch15 import recent, tiers, what_binds
from mixoff.classroom.checks.machinery import Check, difference
