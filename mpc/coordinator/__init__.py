"""The coordinator: an untrusted mailbox with order. It can prove nothing and read nothing."""
