"""The parent instance's side: it launches enclaves and pipes bytes, and nobody trusts it."""
