"""Durable steps: one idempotent, observable activity each. Thin: they decide nothing, call a port, classify errors.

`signatures` is all that workflows see: names, messages, timeouts and retry rules as data. `control`, `source` and
`target` implement them; a test compares the two.
"""
