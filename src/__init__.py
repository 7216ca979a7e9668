"""toolfleet: durable background tool execution for AI agents."""
