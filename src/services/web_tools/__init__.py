"""The MCP server shipped with the project: one tool, `web_crawl`, over streamable HTTP and stdio."""
