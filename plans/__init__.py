"""Recovery plans as code: model, loader (line and column), lint, schedule of steps, catalogue of a folder.

A plan is a YAML file that a team reviews like code; `examples/crm.yaml` shows every part of it. Durations are seconds
(floats) everywhere inside. Pure but for `catalog.py`, which reads files. May import `domain` and nothing else of ours.
"""
