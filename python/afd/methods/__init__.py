"""Methods for training a student; `afd.trainer.build` creates the configured one."""
