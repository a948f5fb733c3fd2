"""What a pass and a job will take: rates measured on a machine, and the schedule run with them. Pure logic."""
