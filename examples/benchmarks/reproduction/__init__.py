"""What the reproduction benchmarks share: data, splits, one study of rates and seeds, tests and tables."""
