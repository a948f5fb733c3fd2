"""From budgets to a plan: what is placed where, before anything is allocated. Pure logic."""
