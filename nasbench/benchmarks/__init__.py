"""Scripts that re-measure what the README claims; each writes a JSON file of its name beside itself."""
