"""What runs outside the service: making the versions that it serves. Nothing in `app` imports this."""
