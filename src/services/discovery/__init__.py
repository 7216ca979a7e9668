"""Finding NATS, Redis and MCP servers: explicit URLs, Consul, or nothing."""
