"""What is remembered beside the gallery: workspace, lineage, certificates, plans, evaluations, the claim."""
