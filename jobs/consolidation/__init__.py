"""Consolidation: a checkpoint becomes safetensors files, part by part, by tasks of the cluster."""
