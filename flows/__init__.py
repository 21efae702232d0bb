"""Where the stages meet: configuration, registry, Prefect flows, the service and the command line."""
