"""What all sides of a session must agree on, and everything on the untrusted side."""
