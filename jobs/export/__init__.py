"""Exports of weights: the official names, the backbone, a Hugging Face folder, ONNX."""
