"""Composition root: settings, wiring of adapters, workers, metrics, command line. Knows everything of the product."""
