"""cleverhans (4.0) for PyTorch on rvlm's engine; see docs/compat.md."""
