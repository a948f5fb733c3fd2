"""The zig-zag order: which layer and which micro-batch come next. Pure logic."""
