"""Ways to train a student; build.py makes the one that a configuration names."""
