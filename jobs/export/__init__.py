"""Exports: weights under official names, as backbone, Hugging Face folder and ONNX; a run's records as tables."""
