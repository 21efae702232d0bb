"""The configuration of a workspace, its reference, and the template that a new one starts from."""
