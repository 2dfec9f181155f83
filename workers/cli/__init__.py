"""The command line: `farshore …`, also as `temporal farshore …`. Thin: everything goes through the typed client."""
