"""Keeps the gallery: versioned tables, views, plans, waves, the embedding engine and search."""
