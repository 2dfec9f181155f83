"""The main job, live: `python -m farshore.lab.demo`. It uses Farshore from outside, by its command line."""
