"""Judges arrays: outcomes, metrics, intervals, the decision and its report. No torch, ray, faiss or prefect."""
