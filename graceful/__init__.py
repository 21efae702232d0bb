"""Continual compatible updates of embedding models: train, evaluate, decide, roll out, roll back."""
