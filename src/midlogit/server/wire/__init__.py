"""The bodies of requests and responses, as types that also make the OpenAPI description."""
