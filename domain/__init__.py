"""The pure model of site recovery: machine states and operations, points, retention, errors, ids.

No I/O, no clock, no SDK: every function here is a table look-up or arithmetic, so that a workflow may call it.
Imports nothing but the standard library.
"""
