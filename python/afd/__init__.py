"""On-Policy Adversarial Flow Distillation: ops, causal video student, trainer."""

__version__ = "0.1.0"
