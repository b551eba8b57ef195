"""Reinforcement learning from human feedback: reward models, rejection sampling, PPO."""
