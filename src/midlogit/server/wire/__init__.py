"""What crosses the wire: the bodies of requests and responses, as types that also make the OpenAPI description."""
