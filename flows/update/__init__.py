"""An update: its order, its steps, the decision carried out, and the report of it."""
