"""A party's own process: its data, its policy, its keys, its memory of what it signed."""
