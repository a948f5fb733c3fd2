"""The worker programs: disk loader, CPU attention, compute. Each is a process that the coordinator starts."""
