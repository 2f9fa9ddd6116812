"""Kernels: the few tensor operations whose speed matters, as a contract with one truth and faster backends.

Called by models (compute) and by the CLI (`doctor`). Knows no policy, page table or request.
"""
