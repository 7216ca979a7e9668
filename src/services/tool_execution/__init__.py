"""MCP sessions, the tool catalogue, routing and delivery policy."""
