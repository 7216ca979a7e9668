"""Tests of the tool execution, against real MCP servers in processes of their own."""
