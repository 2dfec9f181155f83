"""Room of the house; see docs."""
