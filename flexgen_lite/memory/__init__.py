"""What lies where in main memory, and how much of it each process takes."""
