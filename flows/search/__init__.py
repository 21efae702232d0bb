"""Answering queries: the searcher for applications, and the HTTP endpoint over it."""
