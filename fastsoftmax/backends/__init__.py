"""The ways to compute, one module each; `fastsoftmax._dispatch` chooses among them."""
