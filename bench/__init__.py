"""The benchmark of rnnfast against torch.nn: `python -m bench`, see docs/benchmarking.md."""
