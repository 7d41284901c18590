"""Kernels for one kind of hardware; ``functional`` has what each computes, in plain PyTorch."""
