"""Training on Lightning Fabric: one loop for plain and distilled runs."""
