"""Checks that a user can run: whether this installation computes what the released code does."""
