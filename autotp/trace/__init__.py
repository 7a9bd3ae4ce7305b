"""Model → graph: capture, call sites, provenance integers, scenarios, example inputs."""
