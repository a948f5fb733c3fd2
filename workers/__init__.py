"""The worker programs: disk loader, CPU attention, compute. Each runs as its own process, started by the coordinator."""
