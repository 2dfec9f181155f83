"""What crosses the wire: inputs, results, updates, progress, the names of workflows, queues and search attributes, the
payload converter, and the typed client. Other services need this room and nothing else of Farshore.
"""
