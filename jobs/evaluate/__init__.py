"""Evaluation of weights on labelled samples: features, probes on them, and a page. Knows nothing of running runs."""
