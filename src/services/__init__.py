"""Everything below the transports: jobs, discovery, tools, embedded servers, telemetry."""
