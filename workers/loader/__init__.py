"""The disk loader: reads weights into slots of the arena, ahead of need."""
