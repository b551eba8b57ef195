"""Learning from preferences: reward models, rejection sampling, PPO."""
