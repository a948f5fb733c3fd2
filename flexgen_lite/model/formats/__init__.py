"""Checkpoints whose weights are in few bits, format by format: their tensors are recognised, and what they say of a
weight is put as stored_tensor.py has it. What lies where in a line is in workers/loader/stored_layouts.py.
"""
