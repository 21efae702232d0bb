"""Where a run happens: Ray clusters and jobs, encoders at work, progress, the flow server's environment."""
