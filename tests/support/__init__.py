"""What test files share: the parity harness and its rule, twins of torch.nn's modules, launchers, child processes."""
