"""Parity checks of this installation against the released code, for users to run."""
