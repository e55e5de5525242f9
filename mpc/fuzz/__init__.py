"""The adversary: the real machines in one world that it owns, and the invariants that must hold all the same."""
