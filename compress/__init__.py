"""Neural networks made small."""
