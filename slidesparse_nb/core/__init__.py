"""Plain values and NumPy: patterns, dtypes, packed weights, problems, checks of operands, the specification. No device."""
