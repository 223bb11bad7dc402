"""Running untrusted Python apart from everything else. Its modules need the standard library only."""
