"""Cost model, measurement and synchronisation period planner."""
