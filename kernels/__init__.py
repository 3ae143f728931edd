"""Triton kernels: device code and its launchers, without checks and without autograd.

Imported only when the back end "triton" runs; the public ops live in `ulfine_fast.ops`.
"""
