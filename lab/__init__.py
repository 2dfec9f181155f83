"""The laboratory: stand-ins of outside systems that speak the real protocols and hold real bytes, and the demo on them.

Honest: it rejects what reality rejects, is slow where reality is slow, fails as reality fails, and clients that are not
ours agree with it. May touch SDK types, sockets and files under a root that it is given; listens on loopback only. Never
imports the product, and the product never imports it: it drives Farshore as its users do.
"""
