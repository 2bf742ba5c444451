"""Measurements of cost; run each as a module from the repository root."""
