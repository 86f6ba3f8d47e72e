"""Commands that run until they are ended: the HTTP server and the MCP server."""
