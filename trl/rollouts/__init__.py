"""Where completions come from: engines that sample, and conversations with tools and environments on top of them."""
